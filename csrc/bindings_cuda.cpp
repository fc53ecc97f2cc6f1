// imu_fast._C_cuda: raw pointers, shapes and a stream in, checked by imu_fast/solvers/cuda.py
// beforehand. Importing it needs no driver; a call without one raises its text.
#include <pybind11/pybind11.h>

#include "cholesky_cuda.h"
#include "cuda_status.h"
#include "cusolver.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

using imu_fast::Cusolver;

template <typename T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

template <typename T>
void small_factor(Address a, Address u, int64_t batch, int n, double damping, Address status,
                  int device, Address stream) {
  const imu_fast::DeviceGuard guard(device);
  imu_fast::small_factor<T>(as<const T>(a), as<T>(u), batch, n, static_cast<T>(damping),
                            as<int>(status), stream_of(stream));
}

template <typename T>
void small_solve(Address u, int64_t batch, int n, Address b, int64_t m, int device,
                 Address stream) {
  const imu_fast::DeviceGuard guard(device);
  imu_fast::small_solve<T>(as<const T>(u), batch, n, as<T>(b), m, stream_of(stream));
}

template <typename T>
size_t workspace(Cusolver& solver, int64_t n, int device, Address stream) {
  return solver.workspace<T>(n, device, stream_of(stream));
}

template <typename T>
void factor(Cusolver& solver, Address a, int64_t batch, int64_t n, double damping, Address status,
            Address workspace, size_t bytes, int device, Address stream) {
  solver.factor<T>(as<T>(a), batch, n, static_cast<T>(damping), as<int>(status),
                   as<void>(workspace), bytes, device, stream_of(stream));
}

template <typename T>
void factor_batched(Cusolver& solver, Address a, int64_t batch, int n, double damping,
                    Address status, Address pointers, int device, Address stream) {
  solver.factor_batched<T>(as<T>(a), batch, n, static_cast<T>(damping), as<int>(status),
                           as<T*>(pointers), device, stream_of(stream));
}

template <typename T>
void solve(Cusolver& solver, Address u, int64_t batch, int64_t n, Address b, int64_t m,
           Address info, int device, Address stream) {
  solver.solve<T>(as<const T>(u), batch, n, as<T>(b), m, as<int>(info), device,
                  stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.doc() = "Damped Cholesky on CUDA pointers; use imu_fast.solvers.cholesky.";
  m.attr("__cuda__") = CUDART_VERSION;
  m.def("largest_small_order_f32", &imu_fast::largest_small_order<float>, unlocked);
  m.def("largest_small_order_f64", &imu_fast::largest_small_order<double>, unlocked);
  m.def("small_factor_f32", &small_factor<float>, unlocked);
  m.def("small_factor_f64", &small_factor<double>, unlocked);
  m.def("small_solve_f32", &small_solve<float>, unlocked);
  m.def("small_solve_f64", &small_solve<double>, unlocked);
  py::class_<Cusolver>(m, "Cusolver")
      .def(py::init<const std::string&>())
      .def("workspace_f32", &workspace<float>, unlocked)
      .def("workspace_f64", &workspace<double>, unlocked)
      .def("factor_f32", &factor<float>, unlocked)
      .def("factor_f64", &factor<double>, unlocked)
      .def("factor_batched_f32", &factor_batched<float>, unlocked)
      .def("factor_batched_f64", &factor_batched<double>, unlocked)
      .def("solve_f32", &solve<float>, unlocked)
      .def("solve_f64", &solve<double>, unlocked);
}
