#include <algorithm>

#include "cholesky_block.h"
#include "cholesky_cuda.h"
#include "cuda_status.h"

namespace imu_fast {
namespace {

constexpr int kThreads = 256;
// What a thread block may use of shared memory without asking.
constexpr int64_t kSharedDefault = 48 << 10;

struct ThreadBlock {
  __device__ int lane() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
};

extern __shared__ __align__(16) unsigned char shared_memory[];

template <typename T>
__global__ void __launch_bounds__(kThreads)
    factor_kernel(const T* a, T* u, int n, T damping, int* status) {
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * n * n;
  factor_block(ThreadBlock{}, a + offset, u + offset, n, damping, status + blockIdx.x,
               reinterpret_cast<T*>(shared_memory));
}

// `columns` right-hand sides of one matrix to a thread block, fewer in the matrix's last one. Two
// blocks at a time leave 128 registers to a thread; aiming at more, the compiler spills on sm_80.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    solve_kernel(const T* u, int n, T* b, int64_t m, int columns, int64_t tiles) {
  const int64_t matrix = blockIdx.x / tiles, first = blockIdx.x % tiles * columns;
  const int count = static_cast<int>(m - first < columns ? m - first : columns);
  solve_block(ThreadBlock{}, u + matrix * n * n, n, b + (matrix * m + first) * n, count,
              reinterpret_cast<T*>(shared_memory));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    damping_kernel(T* a, int64_t batch, int64_t n, T damping) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < batch * n;
       i += step) {
    const int64_t k = i % n;
    a[(i / n * n + k) * n + k] += damping;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pointers_kernel(T** pointers, T* a, int64_t batch, int64_t size) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < batch) pointers[i] = a + i * size;
}

// Two warps for every 32 rows: one of them alone could not hide the latency of its loads.
int threads_for(int n) {
  return static_cast<int>(std::min<int64_t>(kThreads, round_up(2 * static_cast<int64_t>(n), 64)));
}

// A grid's first dimension.
unsigned int blocks(int64_t count) {
  if (count > INT32_MAX) raise("more than 2^31 - 1 thread blocks", __FILE__, __LINE__);
  return static_cast<unsigned int>(count);
}

unsigned int blocks_of_threads(int64_t count) { return blocks((count + kThreads - 1) / kThreads); }

template <typename Kernel>
void allow_shared(Kernel kernel, int64_t bytes) {
  if (bytes <= kSharedDefault) return;
  IMU_FAST_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)));
}

}  // namespace

template <typename T>
int largest_small_order(int device) {
  int bytes = 0;
  IMU_FAST_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  int n = 0;
  while (factor_elements<T>(n + 1) * static_cast<int64_t>(sizeof(T)) <= bytes) ++n;
  return n;
}

template <typename T>
void small_factor(const T* a, T* u, int64_t batch, int n, T damping, int* status,
                  cudaStream_t stream) {
  const int64_t bytes = factor_elements<T>(n) * sizeof(T);
  allow_shared(factor_kernel<T>, bytes);
  factor_kernel<T><<<blocks(batch), threads_for(n), bytes, stream>>>(a, u, n, damping, status);
  IMU_FAST_CUDA(cudaGetLastError());
}

template <typename T>
void small_solve(const T* u, int64_t batch, int n, T* b, int64_t m, cudaStream_t stream) {
  int columns = static_cast<int>(std::min<int64_t>(m, kColumns));
  const auto bytes = [&] { return solve_elements<T>(n, columns) * int64_t{sizeof(T)}; };
  while (columns > 1 && bytes() > kSharedDefault) columns = (columns + 1) / 2;
  const int64_t tiles = (m + columns - 1) / columns;
  allow_shared(solve_kernel<T>, bytes());
  solve_kernel<T><<<blocks(batch * tiles), threads_for(n), bytes(), stream>>>(u, n, b, m, columns,
                                                                              tiles);
  IMU_FAST_CUDA(cudaGetLastError());
}

template <typename T>
void add_damping(T* a, int64_t batch, int64_t n, T damping, cudaStream_t stream) {
  damping_kernel<<<blocks_of_threads(batch * n), kThreads, 0, stream>>>(a, batch, n, damping);
  IMU_FAST_CUDA(cudaGetLastError());
}

template <typename T>
void fill_pointers(T** pointers, T* a, int64_t batch, int64_t size, cudaStream_t stream) {
  pointers_kernel<<<blocks_of_threads(batch), kThreads, 0, stream>>>(pointers, a, batch, size);
  IMU_FAST_CUDA(cudaGetLastError());
}

#define IMU_FAST_INSTANTIATE(T)                                                  \
  template int largest_small_order<T>(int);                                      \
  template void small_factor(const T*, T*, int64_t, int, T, int*, cudaStream_t); \
  template void small_solve(const T*, int64_t, int, T*, int64_t, cudaStream_t);  \
  template void add_damping(T*, int64_t, int64_t, T, cudaStream_t);              \
  template void fill_pointers(T**, T*, int64_t, int64_t, cudaStream_t);
IMU_FAST_INSTANTIATE(float)
IMU_FAST_INSTANTIATE(double)

}  // namespace imu_fast
