// Damped Cholesky on CUDA: kernels of our own. Everything is enqueued on the caller's stream, and
// nothing waits for the device; the caller makes the device of its pointers the current one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace imu_fast {

// The largest order whose matrix fits the shared memory of one thread block on this device.
template <typename T>
int largest_small_order(int device);

// u = upper factor of a + damping I, a thread block for each matrix; a == u factors in place.
//
// a, u: [batch, n, n] row-major, n at most largest_small_order; only the upper triangle is read, and
// written. status: [batch]; 0, or the order of the leading minor that is not positive definite or
// not finite. Such a factor holds NaN, and so does all that is solved with it.
template <typename T>
void small_factor(const T* a, T* u, int64_t batch, int n, T damping, int* status,
                  cudaStream_t stream);

// Solves u^T u x = b in place; b: [batch, m, n] row-major, one right-hand side per row.
// n is bounded by a right-hand side in shared memory: 4,096 and more.
template <typename T>
void small_solve(const T* u, int64_t batch, int n, T* b, int64_t m, cudaStream_t stream);

// a: [batch, n, n]; adds damping to each diagonal.
template <typename T>
void add_damping(T* a, int64_t batch, int64_t n, T damping, cudaStream_t stream);

// pointers[i] = a + i size: what batched library calls take.
template <typename T>
void fill_pointers(T** pointers, T* a, int64_t batch, int64_t size, cudaStream_t stream);

}  // namespace imu_fast
