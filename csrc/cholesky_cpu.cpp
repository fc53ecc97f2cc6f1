#include "cholesky_cpu.h"

#include "parallel.h"

namespace imu_fast {
namespace {

// As parallel_for, each thread's LAPACK on that one thread; the caller's keeps its own number.
template <typename Body>
void side_by_side(int64_t batch, int threads, SetThreads set_threads, const Body& body) {
  parallel_for(
      batch, threads, body, [&] { return set_threads ? set_threads(1) : 0; },
      [&](int before) {
        if (set_threads) set_threads(before);
      });
}

}  // namespace

template <typename T>
void damped_factor(Potrf<T> potrf, SetThreads set_threads, T* a, int64_t batch, int n, T damping,
                   int* status, int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  side_by_side(batch, threads, set_threads, [&](int64_t i) {
    T* matrix = a + i * size;
    for (int64_t k = 0; k < n; ++k) matrix[k * n + k] += damping;
    // Row-major upper is column-major lower.
    potrf("L", &n, matrix, &n, status + i);
  });
}

template <typename T>
void factor_solve(Potrs<T> potrs, SetThreads set_threads, const T* a, int64_t batch, int n, T* b,
                  int m, int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  const int64_t stride = static_cast<int64_t>(m) * n;
  side_by_side(batch, threads, set_threads, [&](int64_t i) {
    int info = 0;
    potrs("L", &n, &m, a + i * size, &n, b + i * stride, &n, &info);
  });
}

template void damped_factor(Potrf<float>, SetThreads, float*, int64_t, int, float, int*, int);
template void damped_factor(Potrf<double>, SetThreads, double*, int64_t, int, double, int*, int);
template void factor_solve(Potrs<float>, SetThreads, const float*, int64_t, int, float*, int, int);
template void factor_solve(Potrs<double>, SetThreads, const double*, int64_t, int, double*, int,
                           int);

}  // namespace imu_fast
