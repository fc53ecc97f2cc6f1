#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cholesky_small.h"
#include "parallel.h"

// One build for every machine: the compiler makes a version for each instruction set, and the
// loader picks one. Elsewhere the plain version serves.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define IMU_FAST_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define IMU_FAST_CLONES
#endif
#define IMU_FAST_INLINE inline __attribute__((always_inline))

namespace imu_fast {
namespace {

// Rows that are factored before the rest is updated: the update is a product of this inner length.
constexpr int kBlock = 8;
// Rows of the update that share each load of the factored block.
constexpr int kRows = 4;

// Columns of the update at once: 64 bytes twice, whatever the instruction set's width.
template <typename T>
struct Pack {
  static constexpr int width = 64 / sizeof(T);
  typedef T type __attribute__((vector_size(64)));
};

// a[i + r, j] -= sum_k u[k, i + r] u[k, j] for j >= i, with `u` the kBlock rows just factored.
// Whole packs are taken from the right end; the leftmost may reach into the unused lower triangle.
template <typename T, int ROWS>
IMU_FAST_INLINE void update_rows(T* __restrict a, const T* __restrict u, int n, int i) {
  using Vector = typename Pack<T>::type;
  constexpr int width = Pack<T>::width;
  T left[ROWS][kBlock];
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < kBlock; ++k) left[r][k] = u[k * n + i + r];
  int stop = n;
  for (; stop > i && stop >= 2 * width; stop -= 2 * width) {
    const int j = stop - 2 * width;
    Vector sum[ROWS][2];
    for (int r = 0; r < ROWS; ++r) std::memcpy(sum[r], a + (i + r) * n + j, sizeof(sum[r]));
#pragma GCC unroll 8
    for (int k = 0; k < kBlock; ++k) {
      Vector shared[2];
      std::memcpy(shared, u + k * n + j, sizeof(shared));
      for (int r = 0; r < ROWS; ++r) {
        sum[r][0] -= left[r][k] * shared[0];
        sum[r][1] -= left[r][k] * shared[1];
      }
    }
    for (int r = 0; r < ROWS; ++r) std::memcpy(a + (i + r) * n + j, sum[r], sizeof(sum[r]));
  }
  for (int j = i; j < stop; ++j)
    for (int r = 0; r < ROWS; ++r) {
      T sum = 0;
      for (int k = 0; k < kBlock; ++k) sum += left[r][k] * u[k * n + j];
      a[(i + r) * n + j] -= sum;
    }
}

// A = U^T U in place on the upper triangle, row by row within a block, block by block.
// Returns 0, or the order of the leading minor that is not positive definite (or not finite).
template <typename T>
IMU_FAST_INLINE int factor_one(T* __restrict a, int n) {
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = std::min(n, begin + kBlock);
    for (int k = begin; k < end; ++k) {
      T* row = a + k * n;
      const T pivot = row[k];
      if (!(pivot > T(0)) || !std::isfinite(pivot)) return k + 1;
      const T scale = T(1) / std::sqrt(pivot);
      for (int j = k; j < n; ++j) row[j] *= scale;
      for (int i = k + 1; i < end; ++i) {
        T* below = a + i * n;
        const T factor = row[i];
        for (int j = i; j < n; ++j) below[j] -= factor * row[j];
      }
    }
    // Only a whole block leaves rows behind it.
    const T* block = a + begin * n;
    int i = end;
    for (; i + kRows <= n; i += kRows) update_rows<T, kRows>(a, block, n, i);
    for (; i < n; ++i) update_rows<T, 1>(a, block, n, i);
  }
  return 0;
}

// U^T U x = b in place for one right-hand side.
template <typename T>
IMU_FAST_INLINE void solve_one(const T* __restrict u, T* __restrict b, int n) {
  for (int k = 0; k < n; ++k) {
    const T* row = u + k * n;
    const T value = b[k] /= row[k];
    for (int i = k + 1; i < n; ++i) b[i] -= row[i] * value;
  }
  for (int k = n - 1; k >= 0; --k) {
    const T* row = u + k * n;
    T partial[16] = {};
    int i = k + 1;
    for (; i + 16 <= n; i += 16)
      for (int lane = 0; lane < 16; ++lane) partial[lane] += row[i + lane] * b[i + lane];
    T sum = 0;
    for (; i < n; ++i) sum += row[i] * b[i];
    for (int lane = 0; lane < 16; ++lane) sum += partial[lane];
    b[k] = (b[k] - sum) / row[k];
  }
}

IMU_FAST_CLONES int factor_any(float* a, int n) { return factor_one(a, n); }
IMU_FAST_CLONES int factor_any(double* a, int n) { return factor_one(a, n); }
IMU_FAST_CLONES void solve_any(const float* u, float* b, int n) { solve_one(u, b, n); }
IMU_FAST_CLONES void solve_any(const double* u, double* b, int n) { solve_one(u, b, n); }

}  // namespace

template <typename T>
void small_factor(const T* a, T* u, int64_t batch, int n, T damping, int* status, int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  parallel_for(batch, threads, [&](int64_t i) {
    T* out = u + i * size;
    if (a != u) std::memcpy(out, a + i * size, size * sizeof(T));
    for (int k = 0; k < n; ++k) out[k * n + k] += damping;
    status[i] = factor_any(out, n);
    if (status[i] != 0) out[0] = std::numeric_limits<T>::quiet_NaN();
  });
}

template <typename T>
void small_solve(const T* u, int64_t batch, int n, T* b, int m, int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  parallel_for(batch, threads, [&](int64_t i) {
    for (int j = 0; j < m; ++j) solve_any(u + i * size, b + (i * m + j) * n, n);
  });
}

template void small_factor(const float*, float*, int64_t, int, float, int*, int);
template void small_factor(const double*, double*, int64_t, int, double, int*, int);
template void small_solve(const float*, int64_t, int, float*, int, int);
template void small_solve(const double*, int64_t, int, double*, int, int);

}  // namespace imu_fast
