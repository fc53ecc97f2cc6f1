#include "cusolver.h"

#include <dlfcn.h>

#include <algorithm>
#include <type_traits>

#include "cholesky_cuda.h"
#include "cuda_status.h"

namespace imu_fast {
namespace {

// Row-major upper is column-major lower: CUBLAS_FILL_MODE_LOWER.
constexpr int kLower = 0;

// CUDA_R_32F and CUDA_R_64F.
template <typename T>
constexpr int kType = std::is_same_v<T, float> ? 0 : 1;

const char* status_name(int status) {
  switch (status) {
    case 1: return "CUSOLVER_STATUS_NOT_INITIALIZED";
    case 2: return "CUSOLVER_STATUS_ALLOC_FAILED";
    case 3: return "CUSOLVER_STATUS_INVALID_VALUE";
    case 4: return "CUSOLVER_STATUS_ARCH_MISMATCH";
    case 5: return "CUSOLVER_STATUS_MAPPING_ERROR";
    case 6: return "CUSOLVER_STATUS_EXECUTION_FAILED";
    case 7: return "CUSOLVER_STATUS_INTERNAL_ERROR";
    case 8: return "CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED";
    case 9: return "CUSOLVER_STATUS_NOT_SUPPORTED";
    case 31: return "CUSOLVER_STATUS_INVALID_WORKSPACE";
    default: return "cuSOLVER status";
  }
}

void check_cusolver(int status, const char* call, const char* file, int line) {
  if (status == 0) return;
  raise(std::string(call) + ": " + status_name(status) + ", " + std::to_string(status), file,
        line);
}

#define IMU_FAST_CUSOLVER(call) check_cusolver(call, #call, __FILE__, __LINE__)

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) raise(dlerror(), __FILE__, __LINE__);
}

}  // namespace

Cusolver::Cusolver(const std::string& library) {
  // Never closed: handles, and what they enqueued, may outlive this object.
  void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) raise(dlerror(), __FILE__, __LINE__);
  find(opened, "cusolverDnCreate", call_.create);
  find(opened, "cusolverDnSetStream", call_.set_stream);
  find(opened, "cusolverDnCreateParams", call_.create_params);
  find(opened, "cusolverDnXpotrf_bufferSize", call_.potrf_size);
  find(opened, "cusolverDnXpotrf", call_.potrf);
  find(opened, "cusolverDnXpotrs", call_.potrs);
  find(opened, "cusolverDnSpotrfBatched", call_.potrf_batched_f32);
  find(opened, "cusolverDnDpotrfBatched", call_.potrf_batched_f64);
}

Cusolver::Context& Cusolver::context(int device, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(contexts_busy_);
  Context& found = contexts_[{device, stream}];
  if (found.params == nullptr) {
    if (found.handle == nullptr) IMU_FAST_CUSOLVER(call_.create(&found.handle));
    IMU_FAST_CUSOLVER(call_.create_params(&found.params));
  }
  return found;
}

template <typename T>
size_t Cusolver::workspace(int64_t n, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  Context& own = context(device, stream);
  const std::lock_guard<std::mutex> lock(own.busy);
  IMU_FAST_CUSOLVER(call_.set_stream(own.handle, stream));
  size_t on_device = 0, on_host = 0;
  // The matrix itself is not looked at.
  IMU_FAST_CUSOLVER(call_.potrf_size(own.handle, own.params, kLower, n, kType<T>, nullptr, n,
                                     kType<T>, &on_device, &on_host));
  own.host_workspace.resize(std::max(own.host_workspace.size(), on_host));
  return on_device;
}

template <typename T>
void Cusolver::factor(T* a, int64_t batch, int64_t n, T damping, int* status, void* workspace,
                      size_t bytes, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  Context& own = context(device, stream);
  const std::lock_guard<std::mutex> lock(own.busy);
  IMU_FAST_CUSOLVER(call_.set_stream(own.handle, stream));
  add_damping(a, batch, n, damping, stream);
  for (int64_t i = 0; i < batch; ++i)
    IMU_FAST_CUSOLVER(call_.potrf(own.handle, own.params, kLower, n, kType<T>, a + i * n * n, n,
                                  kType<T>, workspace, bytes, own.host_workspace.data(),
                                  own.host_workspace.size(), status + i));
}

template <typename T>
void Cusolver::factor_batched(T* a, int64_t batch, int n, T damping, int* status, T** pointers,
                              int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  Context& own = context(device, stream);
  const std::lock_guard<std::mutex> lock(own.busy);
  IMU_FAST_CUSOLVER(call_.set_stream(own.handle, stream));
  add_damping(a, batch, n, damping, stream);
  fill_pointers(pointers, a, batch, static_cast<int64_t>(n) * n, stream);
  const int count = static_cast<int>(batch);
  if constexpr (std::is_same_v<T, float>)
    IMU_FAST_CUSOLVER(
        call_.potrf_batched_f32(own.handle, kLower, n, pointers, n, status, count));
  else
    IMU_FAST_CUSOLVER(
        call_.potrf_batched_f64(own.handle, kLower, n, pointers, n, status, count));
}

template <typename T>
void Cusolver::solve(const T* u, int64_t batch, int64_t n, T* b, int64_t m, int* info, int device,
                     cudaStream_t stream) {
  const DeviceGuard guard(device);
  Context& own = context(device, stream);
  const std::lock_guard<std::mutex> lock(own.busy);
  IMU_FAST_CUSOLVER(call_.set_stream(own.handle, stream));
  for (int64_t i = 0; i < batch; ++i)
    IMU_FAST_CUSOLVER(call_.potrs(own.handle, own.params, kLower, n, m, kType<T>, u + i * n * n, n,
                                  kType<T>, b + i * m * n, n, info));
}

#define IMU_FAST_INSTANTIATE(T)                                                                 \
  template size_t Cusolver::workspace<T>(int64_t, int, cudaStream_t);                           \
  template void Cusolver::factor(T*, int64_t, int64_t, T, int*, void*, size_t, int,             \
                                 cudaStream_t);                                                 \
  template void Cusolver::factor_batched(T*, int64_t, int, T, int*, T**, int, cudaStream_t);    \
  template void Cusolver::solve(const T*, int64_t, int64_t, T*, int64_t, int*, int, cudaStream_t);
IMU_FAST_INSTANTIATE(float)
IMU_FAST_INSTANTIATE(double)

}  // namespace imu_fast
