#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cholesky_small.h"
#include "parallel.h"
#include "versions.h"

namespace imu_fast {
namespace {

// A = U^T U, left-looking: a tile of U, ROWS x (V vectors of BYTES), stays in registers from the
// first product to the last. ROWS x VECTORS accumulators must hide the latency of a multiply-add
// and leave registers for its operands.
template <typename T, int BYTES, int ROWS, int VECTORS>
struct Small {
  static constexpr int width = BYTES / sizeof(T);
  static_assert(width % ROWS == 0, "a diagonal block lies within one vector of columns");
  typedef T Vector __attribute__((vector_size(BYTES), may_alias));

  // Vector v of those that begin at element `offset` of the workspace.
  static IMU_FAST_INLINE Vector& at(T* w, int offset, int v) {
    return *reinterpret_cast<Vector*>(w + offset + v * width);
  }

  static int rounded(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

  // Columns of the workspace: an odd number of cache lines, so that a column meets every set.
  static int stride(int n) {
    constexpr int line = 64 / sizeof(T);
    return (rounded(n, line) / line | 1) * line;
  }

  // Elements of the workspace of an n x n matrix.
  static size_t workspace(int n) { return static_cast<size_t>(rounded(n, ROWS)) * stride(n); }

  // Factors a diagonal block in place. Returns 0, or the order of the minor that is not positive
  // definite (or not finite).
  static IMU_FAST_INLINE int factor_diagonal(T (&d)[ROWS][ROWS], T (&inverse)[ROWS]) {
    int status = 0;
    IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r) {
      const T pivot = d[r][r];
      if (!status && (!(pivot > T(0)) || !std::isfinite(pivot))) status = r + 1;
      inverse[r] = T(1) / std::sqrt(pivot);
      IMU_FAST_UNROLL for (int c = r + 1; c < ROWS; ++c) d[r][c] *= inverse[r];
      IMU_FAST_UNROLL for (int q = r + 1; q < ROWS; ++q)
        IMU_FAST_UNROLL for (int c = q; c < ROWS; ++c) d[q][c] -= d[r][q] * d[r][c];
    }
    return status;
  }

  // Rows i.. and columns j.. of U: what the rows above leave of A, solved by the diagonal block,
  // which the first tile of these rows (the one that holds it) factors into d and inverse.
  template <int V>
  static IMU_FAST_INLINE int tile(T* w, int ld, int i, int j, bool first, T (&d)[ROWS][ROWS],
                                  T (&inverse)[ROWS]) {
    Vector sum[ROWS][V];
    IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
      IMU_FAST_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = at(w, (i + r) * ld + j, v);
    for (int k = 0; k < i; ++k) {
      const T* left = w + k * ld + i;
      IMU_FAST_UNROLL for (int v = 0; v < V; ++v) {
        const Vector above = at(w, k * ld + j, v);
        IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r) sum[r][v] -= left[r] * above;
      }
    }
    if (first) {
      IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r) {
        at(w, (i + r) * ld + j, 0) = sum[r][0];
        std::memcpy(d[r], w + (i + r) * ld + i, sizeof(d[r]));
      }
      const int status = factor_diagonal(d, inverse);
      if (status) return i + status;
    }
    IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
      IMU_FAST_UNROLL for (int v = 0; v < V; ++v) {
        IMU_FAST_UNROLL for (int q = 0; q < r; ++q) sum[r][v] -= d[q][r] * sum[q][v];
        sum[r][v] *= inverse[r];
        at(w, (i + r) * ld + j, v) = sum[r][v];
      }
    return 0;
  }

  // The workspace w has rows and columns that are aligned and padded with those of the identity.
  static IMU_FAST_INLINE int factor(const T* a, T* u, T* w, int n, T damping) {
    const int ld = stride(n), rows = rounded(n, ROWS), columns = rounded(n, width);
    for (int i = 0; i < rows; ++i) {
      T* row = w + i * ld;
      if (i < n) std::memcpy(row + i, a + i * n + i, (n - i) * sizeof(T));
      for (int j = i < n ? n : i; j < columns; ++j) row[j] = T(0);
      row[i] = i < n ? row[i] + damping : T(1);
    }
    for (int i = 0; i < rows; i += ROWS) {
      T d[ROWS][ROWS], inverse[ROWS];
      for (int j = i / width * width, first = true; j < columns; first = false) {
        const bool whole = j + VECTORS * width <= columns;
        const int status = whole ? tile<VECTORS>(w, ld, i, j, first, d, inverse)
                                 : tile<1>(w, ld, i, j, first, d, inverse);
        if (status) return status;
        j += whole ? VECTORS * width : width;
      }
      for (int k = i; k < i + ROWS && k < n; ++k)
        std::memcpy(u + k * n + k, w + k * ld + k, (n - k) * sizeof(T));
    }
    return 0;
  }

  // x = U_ii^-T b for R rows from i; then their part of every later row.
  template <int R>
  static IMU_FAST_INLINE void forward(const T* u, T* b, int n, int i) {
    T x[R];
    for (int r = 0; r < R; ++r) {
      const T inverse = T(1) / u[(i + r) * n + i + r];
      x[r] = b[i + r];
      for (int q = 0; q < r; ++q) x[r] -= u[(i + q) * n + i + r] * x[q];
      b[i + r] = x[r] *= inverse;
    }
    int j = i + R;
    for (; j + width <= n; j += width) {
      Vector sum, row;
      std::memcpy(&sum, b + j, sizeof(sum));
      for (int r = 0; r < R; ++r) {
        std::memcpy(&row, u + (i + r) * n + j, sizeof(row));
        sum -= x[r] * row;
      }
      std::memcpy(b + j, &sum, sizeof(sum));
    }
    for (; j < n; ++j)
      for (int r = 0; r < R; ++r) b[j] -= x[r] * u[(i + r) * n + j];
  }

  // x = U_ii^-1 (b - U_i,later x_later) for R rows from i.
  template <int R>
  static IMU_FAST_INLINE void backward(const T* u, T* b, int n, int i) {
    Vector sum[R] = {};
    int j = i + R;
    for (; j + width <= n; j += width) {
      Vector later, row;
      std::memcpy(&later, b + j, sizeof(later));
      for (int r = 0; r < R; ++r) {
        std::memcpy(&row, u + (i + r) * n + j, sizeof(row));
        sum[r] += row * later;
      }
    }
    T rest[R] = {};
    for (; j < n; ++j)
      for (int r = 0; r < R; ++r) rest[r] += u[(i + r) * n + j] * b[j];
    for (int r = R - 1; r >= 0; --r) {
      const T inverse = T(1) / u[(i + r) * n + i + r];
      for (int lane = 0; lane < width; ++lane) rest[r] += sum[r][lane];
      T x = b[i + r] - rest[r];
      for (int q = r + 1; q < R; ++q) x -= u[(i + r) * n + i + q] * b[i + q];
      b[i + r] = x * inverse;
    }
  }

  // U^T U x = b in place for one right-hand side.
  static IMU_FAST_INLINE void solve(const T* u, T* b, int n) {
    int i = 0;
    for (; i + ROWS <= n; i += ROWS) forward<ROWS>(u, b, n, i);
    for (; i < n; ++i) forward<1>(u, b, n, i);
    for (--i; i >= n / ROWS * ROWS; --i) backward<1>(u, b, n, i);
    for (i -= ROWS - 1; i >= 0; i -= ROWS) backward<ROWS>(u, b, n, i);
  }
};

template <typename T>
struct Routines {
  size_t (*workspace)(int n);
  int (*factor)(const T* a, T* u, T* w, int n, T damping);
  void (*solve)(const T* u, T* b, int n);
};

// One version: its name, its instruction set, and BYTES, ROWS, VECTORS.
#define IMU_FAST_VERSION(NAME, TARGET, ...)                                         \
  template <typename T>                                                             \
  TARGET int factor_##NAME(const T* a, T* u, T* w, int n, T damping) {              \
    return Small<T, __VA_ARGS__>::factor(a, u, w, n, damping);                      \
  }                                                                                 \
  template <typename T>                                                             \
  TARGET void solve_##NAME(const T* u, T* b, int n) {                               \
    Small<T, __VA_ARGS__>::solve(u, b, n);                                          \
  }                                                                                 \
  template <typename T>                                                             \
  constexpr Routines<T> NAME = {Small<T, __VA_ARGS__>::workspace, factor_##NAME<T>, \
                                solve_##NAME<T>};

IMU_FAST_VERSION(plain, , 32, 4, 1)
#ifdef IMU_FAST_X86
IMU_FAST_VERSION(avx2, IMU_FAST_AVX2, 32, 4, 2)
IMU_FAST_VERSION(avx512, IMU_FAST_AVX512, 64, 8, 2)
#endif

}  // namespace

namespace {

// Factors one matrix in memory that the thread keeps.
template <typename T>
int factor_one(const Routines<T>& run, const T* a, T* u, int n, T damping) {
  thread_local std::vector<T> memory;
  constexpr size_t line = 64 / sizeof(T);
  memory.resize(std::max(memory.size(), run.workspace(n) + line));
  const size_t misaligned = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(T) % line;
  return run.factor(a, u, memory.data() + line - misaligned, n, damping);
}

}  // namespace

template <typename T>
void small_factor(const T* a, T* u, int64_t batch, int n, T damping, int* status, int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  const Routines<T>& run = IMU_FAST_WIDEST(T);
  parallel_for(batch, threads, [&](int64_t i) {
    status[i] = factor_one(run, a + i * size, u + i * size, n, damping);
    if (status[i] != 0) u[i * size] = std::numeric_limits<T>::quiet_NaN();
  });
}

template <typename T>
void small_solve(const T* u, int64_t batch, int n, T* b, int m, int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  const Routines<T>& run = IMU_FAST_WIDEST(T);
  parallel_for(batch, threads, [&](int64_t i) {
    for (int j = 0; j < m; ++j) run.solve(u + i * size, b + (i * m + j) * n, n);
  });
}

template <typename T>
bool small_damped_solve(const T* a, const T* b, T* x, int64_t batch, int n, int m, T damping,
                        int threads) {
  const int64_t size = static_cast<int64_t>(n) * n;
  const Routines<T>& run = IMU_FAST_WIDEST(T);
  std::atomic<bool> finite{true};
  parallel_for(batch, threads, [&](int64_t i) {
    thread_local std::vector<T> memory;
    memory.resize(std::max<size_t>(memory.size(), size + n));
    T *u = memory.data(), *column = u + size;
    const T* right = b + i * n * m;
    T* out = x + i * n * m;
    const bool failed = factor_one(run, a + i * size, u, n, damping) != 0;
    bool all = !failed;
    for (int j = 0; j < m; ++j) {
      for (int k = 0; k < n; ++k) column[k] = right[k * m + j];
      if (!failed) run.solve(u, column, n);
      for (int k = 0; k < n; ++k) {
        out[k * m + j] = failed ? std::numeric_limits<T>::quiet_NaN() : column[k];
        all &= std::isfinite(column[k]);
      }
    }
    if (!all) finite = false;
  });
  return finite;
}

template void small_factor(const float*, float*, int64_t, int, float, int*, int);
template void small_factor(const double*, double*, int64_t, int, double, int*, int);
template void small_solve(const float*, int64_t, int, float*, int, int);
template void small_solve(const double*, int64_t, int, double*, int, int);
template bool small_damped_solve(const float*, const float*, float*, int64_t, int, int, float, int);
template bool small_damped_solve(const double*, const double*, double*, int64_t, int, int, double,
                                 int);

}  // namespace imu_fast
