// imu_fast._C: raw pointers and shapes in, checked by who calls: imu_fast/solvers/cholesky/ and
// imu_fast/ops/. imu_fast/ops/extension.py loads it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cholesky_cpu.h"
#include "cholesky_small.h"
#include "conjugate_gradient.h"
#include "head_ascent.h"
#include "offsets.h"
#include "parallel.h"
#include "softmax_residual.h"
#include "squared_products.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void factor(Address potrf, Address set_threads, Address a, int64_t batch, int n, double damping,
            Address status, int threads) {
  py::gil_scoped_release release;
  imu_fast::damped_factor<T>(reinterpret_cast<imu_fast::Potrf<T>>(potrf),
                             reinterpret_cast<imu_fast::SetThreads>(set_threads), as<T>(a), batch,
                             n, static_cast<T>(damping), as<int>(status), threads);
}

template <typename T>
void solve(Address potrs, Address set_threads, Address a, int64_t batch, int n, Address b, int m,
           int threads) {
  py::gil_scoped_release release;
  imu_fast::factor_solve<T>(reinterpret_cast<imu_fast::Potrs<T>>(potrs),
                            reinterpret_cast<imu_fast::SetThreads>(set_threads), as<const T>(a),
                            batch, n, as<T>(b), m, threads);
}

template <typename T>
void small_factor(Address a, Address u, int64_t batch, int n, double damping, Address status,
                  int threads) {
  py::gil_scoped_release release;
  imu_fast::small_factor<T>(as<const T>(a), as<T>(u), batch, n, static_cast<T>(damping),
                            as<int>(status), threads);
}

template <typename T>
void small_solve(Address u, int64_t batch, int n, Address b, int m, int threads) {
  py::gil_scoped_release release;
  imu_fast::small_solve<T>(as<const T>(u), batch, n, as<T>(b), m, threads);
}

template <typename T>
bool small_damped_solve(Address a, Address b, Address x, int64_t batch, int n, int m,
                        double damping, int threads) {
  py::gil_scoped_release release;
  return imu_fast::small_damped_solve<T>(as<const T>(a), as<const T>(b), as<T>(x), batch, n, m,
                                         static_cast<T>(damping), threads);
}

template <typename T>
void advance(Address x, Address r, Address p, Address mp, Address rho, Address size, Address goal,
             Address step, int64_t m, int64_t n, bool turns, int threads) {
  py::gil_scoped_release release;
  imu_fast::advance<T>({as<T>(x), as<T>(r), as<T>(p), as<const T>(mp), as<T>(rho), as<T>(size),
                        as<const T>(goal), as<T>(step), m, n},
                       turns, threads);
}

template <typename T>
void turn(Address r, Address p, Address z, Address rho, Address step, int64_t m, int64_t n,
          int threads) {
  py::gil_scoped_release release;
  imu_fast::turn<T>({nullptr, as<T>(r), as<T>(p), nullptr, as<T>(rho), nullptr, nullptr,
                     as<T>(step), m, n},
                    as<const T>(z), threads);
}

// Of p and the logits: their address, and how far apart tokens and classes are.
template <typename T>
int64_t softmax_residual(std::array<int64_t, 3> p, std::array<int64_t, 3> logits, Address labels,
                         Address scale, Address delta, Address loss, int64_t n, int64_t classes,
                         int threads) {
  py::gil_scoped_release release;
  return imu_fast::softmax_residual<T>(
      {as<const T>(p[0]), p[1], p[2], as<const T>(logits[0]), logits[1], logits[2],
       as<const int64_t>(labels), as<const T>(scale), as<T>(delta), as<T>(loss), n, classes},
      threads);
}

// Of features and theta: their address, and how far apart rows are; sizes: samples that there are,
// those of a step, classes, width.
template <typename T>
imu_fast::Head<T> head_at(std::array<int64_t, 2> features, Address labels, Address chosen,
                          std::array<int64_t, 2> theta, std::array<int64_t, 4> sizes,
                          bool has_bias) {
  return {as<const T>(features[0]), features[1], as<const int64_t>(labels),
          as<const int64_t>(chosen), sizes[0], as<T>(theta[0]), theta[1], sizes[1], sizes[2],
          sizes[3], has_bias};
}

// Both return which of the chosen samples does not fit; then nothing is done.
template <typename T>
int64_t head_gradient(std::array<int64_t, 2> features, Address labels, Address chosen,
                      std::array<int64_t, 2> theta, std::array<int64_t, 4> sizes, bool has_bias,
                      Address share, Address gradient, Address loss, int threads) {
  py::gil_scoped_release release;
  const auto head = head_at<T>(features, labels, chosen, theta, sizes, has_bias);
  const int64_t wrong = imu_fast::unfit(head, head.n);
  if (wrong < 0)
    imu_fast::head_gradient<T>(head, as<const T>(share), as<T>(gradient), as<T>(loss), threads);
  return wrong;
}

template <typename T>
int64_t head_ascent(std::array<int64_t, 2> features, Address labels, Address chosen,
                    std::array<int64_t, 2> theta, std::array<int64_t, 4> sizes, bool has_bias,
                    Address weights, int64_t steps, std::array<T, 4> rates, Address buffer,
                    Address losses, int threads) {
  py::gil_scoped_release release;
  const auto head = head_at<T>(features, labels, chosen, theta, sizes, has_bias);
  const int64_t wrong = imu_fast::unfit(head, chosen ? steps * head.n : head.n);
  if (wrong < 0)
    imu_fast::head_ascent<T>(head, as<const T>(weights), steps,
                             {rates[0], rates[1], rates[2], rates[3]}, as<T>(buffer),
                             as<T>(losses), threads);
  return wrong;
}

// A factor is its data, then the tables of its starts, tokens and places.
template <typename T>
imu_fast::Factor<T> factor_at(const std::array<Address, 4>& at) {
  return {as<const T>(at[0]), as<const int64_t>(at[1]), as<const int64_t>(at[2]),
          as<const int64_t>(at[3])};
}

template <typename T>
void squared_products(std::array<Address, 4> left, std::array<Address, 4> right, Address lengths,
                      int64_t samples, Address total, int64_t rows, int64_t columns,
                      int64_t stride, int threads) {
  py::gil_scoped_release release;
  imu_fast::squared_products<T>(factor_at<T>(left), factor_at<T>(right),
                                as<const int64_t>(lengths), samples, as<T>(total), rows, columns,
                                stride, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loops on raw pointers; use imu_fast.";
  m.attr("__version__") = 3;  // of what is below: see imu_fast/ops/extension.py
  m.attr("__compiler__") = __VERSION__;
  m.def("use_openmp", [](Address run) {  // of GOMP_parallel; 0: threads of its own
    imu_fast::openmp = reinterpret_cast<imu_fast::OpenMP>(run);
  });
  m.def("factor_f32", &factor<float>);
  m.def("factor_f64", &factor<double>);
  m.def("solve_f32", &solve<float>);
  m.def("solve_f64", &solve<double>);
  m.def("small_factor_f32", &small_factor<float>);
  m.def("small_factor_f64", &small_factor<double>);
  m.def("small_solve_f32", &small_solve<float>);
  m.def("small_solve_f64", &small_solve<double>);
  m.def("small_damped_solve_f32", &small_damped_solve<float>);
  m.def("small_damped_solve_f64", &small_damped_solve<double>);
  m.def("advance_f32", &advance<float>);
  m.def("advance_f64", &advance<double>);
  m.def("turn_f32", &turn<float>);
  m.def("turn_f64", &turn<double>);
  m.def("softmax_residual_f32", &softmax_residual<float>);
  m.def("softmax_residual_f64", &softmax_residual<double>);
  m.def("head_gradient_f32", &head_gradient<float>);
  m.def("head_gradient_f64", &head_gradient<double>);
  m.def("head_ascent_f32", &head_ascent<float>);
  m.def("head_ascent_f64", &head_ascent<double>);
  m.def("lengths", [](Address offsets, int64_t n) {
    return imu_fast::lengths(as<const int64_t>(offsets), n);
  });
  m.def("squared_products_f32", &squared_products<float>);
  m.def("squared_products_f64", &squared_products<double>);
}
