#include "cholesky_cpu.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace imu_fast {
namespace {

// Runs body(i) for i in [0, count), taken one by one by `threads` threads.
template <typename Body>
void parallel_for(int64_t count, int threads, SetThreads set_threads, const Body& body) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    // Only this thread's setting: the caller's LAPACK keeps its own number of threads.
    const int before = set_threads ? set_threads(1) : 0;
    for (int64_t i = next++; i < count; i = next++) body(i);
    if (set_threads) set_threads(before);
  };
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; ++t) pool.emplace_back(work);
  } catch (...) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  work();
  for (auto& thread : pool) thread.join();
}

}  // namespace

template <typename T>
void damped_factor(Potrf<T> potrf, SetThreads set_threads, T* a, int64_t batch, int n, T damping,
                   int* status, int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  parallel_for(batch, threads, set_threads, [&](int64_t i) {
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
  parallel_for(batch, threads, set_threads, [&](int64_t i) {
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
