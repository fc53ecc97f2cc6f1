// Damped Cholesky of large matrices by cuSOLVER, which is found at run time: neither its headers nor
// its library are needed to build.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace imu_fast {

// The few functions that are called, as cusolverDn.h declares them, but for its opaque handles, which
// are void*, and its enumerations (status, fill mode, data type), which are int.
struct CusolverFunctions {
  using Handle = void*;
  using Params = void*;

  int (*create)(Handle*);
  int (*set_stream)(Handle, cudaStream_t);
  int (*create_params)(Params*);
  int (*potrf_size)(Handle, Params, int uplo, int64_t n, int type_a, const void* a, int64_t lda,
                    int compute, size_t* on_device, size_t* on_host);
  int (*potrf)(Handle, Params, int uplo, int64_t n, int type_a, void* a, int64_t lda, int compute,
               void* on_device, size_t device_bytes, void* on_host, size_t host_bytes, int* info);
  int (*potrs)(Handle, Params, int uplo, int64_t n, int64_t nrhs, int type_a, const void* a,
               int64_t lda, int type_b, void* b, int64_t ldb, int* info);
  int (*potrf_batched_f32)(Handle, int uplo, int n, float* a[], int lda, int* info, int batch);
  int (*potrf_batched_f64)(Handle, int uplo, int n, double* a[], int lda, int* info, int batch);
};

// One loaded library, and one handle for each device and stream that it was used on: a handle's own
// workspace is used in the order of its stream. Any thread may call; those on the same stream wait
// for each other while they enqueue. Nothing waits for the device.
//
// Handles live as long as the process: when it ends, the driver may be gone before its users.
class Cusolver {
 public:
  // library: a path, or a name for the loader to find. Raises with the loader's text.
  explicit Cusolver(const std::string& library);

  // Bytes of device memory that `factor` wants as workspace.
  template <typename T>
  size_t workspace(int64_t n, int device, cudaStream_t stream);

  // Adds damping to each diagonal and factors in place, one matrix after the other.
  //
  // a: [batch, n, n] row-major; its upper triangle is overwritten with U. status: [batch]; 0, or the
  // order of the leading minor that is not positive definite.
  template <typename T>
  void factor(T* a, int64_t batch, int64_t n, T damping, int* status, void* workspace,
              size_t bytes, int device, cudaStream_t stream);

  // The same side by side. pointers: [batch], workspace on the device.
  template <typename T>
  void factor_batched(T* a, int64_t batch, int n, T damping, int* status, T** pointers, int device,
                      cudaStream_t stream);

  // Solves U^T U x = b in place; b: [batch, m, n] row-major, one right-hand side per row.
  // info: one int on the device, for cuSOLVER to write to.
  template <typename T>
  void solve(const T* u, int64_t batch, int64_t n, T* b, int64_t m, int* info, int device,
             cudaStream_t stream);

 private:
  struct Context {
    std::mutex busy;
    CusolverFunctions::Handle handle = nullptr;
    CusolverFunctions::Params params = nullptr;
    std::vector<char> host_workspace;
  };

  // The context of this device, which must be the current one, and stream.
  Context& context(int device, cudaStream_t stream);

  CusolverFunctions call_{};
  std::mutex contexts_busy_;
  std::map<std::pair<int, cudaStream_t>, Context> contexts_;
};

}  // namespace imu_fast
