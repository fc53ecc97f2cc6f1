// One small matrix on one thread block: damped Cholesky in shared memory, and triangular solves.
//
// Plain functions of a Group (lane, size, sync, sync_warp), so that the same text is the body of the
// kernels in cholesky_cuda.cu and runs on the CPU, a thread for each lane, in
// tests/test_cholesky_block.py, where ThreadSanitizer looks for a missing barrier.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define IMU_FAST_DEVICE __device__ __forceinline__
#define IMU_FAST_UNROLL _Pragma("unroll")
#else
#define IMU_FAST_DEVICE inline
#define IMU_FAST_UNROLL
#endif

namespace imu_fast {

// Rows that are factored, or unknowns that are solved for, between two barriers.
constexpr int kBlock = 16;
constexpr int kWarp = 32;
// Rows of the trailing update that a warp has in flight at once.
constexpr int kRows = 4;
// Right-hand sides that share one reading of the factor.
constexpr int kColumns = 16;

// What one instruction moves: 16 bytes.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int width = 16 / sizeof(T);
  T value[width];
};

// Distance of the kBlock long rows of a panel: 16-byte accesses by consecutive lanes then meet no
// bank of shared memory twice.
template <typename T>
constexpr int kPanelStride = kBlock + Chunk<T>::width;

constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// The upper triangle by rows: element (k, j), j >= k, is at packed_row(n, k) + j.
constexpr int packed_row(int n, int k) { return k * n - k * (k + 1) / 2; }

// Shared memory of factor_block, in elements: packed triangle, panel, reciprocal roots, failure.
template <typename T>
constexpr int64_t factor_elements(int n) {
  const int64_t triangle = static_cast<int64_t>(n) * (n + 1) / 2;
  return round_up(triangle, Chunk<T>::width) + static_cast<int64_t>(n) * kPanelStride<T> +
         kBlock + Chunk<T>::width;
}

// Distance of the right-hand sides in the shared memory of solve_block.
template <typename T>
constexpr int rhs_stride(int n) {
  return static_cast<int>(round_up(n, kBlock)) + Chunk<T>::width;
}

// Shared memory of solve_block, in elements: right-hand sides, diagonal block, its reciprocals.
template <typename T>
constexpr int64_t solve_elements(int n, int columns) {
  return static_cast<int64_t>(columns) * rhs_stride<T>(n) + kBlock * kBlock + kBlock;
}

template <typename T>
IMU_FAST_DEVICE void load(T (&to)[kBlock], const T* from) {
  IMU_FAST_UNROLL
  for (int c = 0; c < kBlock; c += Chunk<T>::width) {
    const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(from + c);
    IMU_FAST_UNROLL
    for (int k = 0; k < Chunk<T>::width; ++k) to[c + k] = chunk.value[k];
  }
}

template <typename T>
IMU_FAST_DEVICE void store(T* to, const T (&from)[kBlock]) {
  IMU_FAST_UNROLL
  for (int c = 0; c < kBlock; c += Chunk<T>::width) {
    Chunk<T> chunk;
    IMU_FAST_UNROLL
    for (int k = 0; k < Chunk<T>::width; ++k) chunk.value[k] = from[c + k];
    *reinterpret_cast<Chunk<T>*>(to + c) = chunk;
  }
}

// Factors rows and columns [begin, begin + width) by the first warp, one column to a lane.
//
// reciprocal[k] = 1 / u[k, k]. A pivot that is not positive, or not finite, becomes NaN, which
// spreads to all that depends on it; `failed` keeps the order of the first such minor.
template <typename T, typename Group>
IMU_FAST_DEVICE void factor_diagonal(const Group& group, T* u, T* reciprocal, int* failed, int n,
                                     int begin, int width) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  const int lane = group.lane();
  for (int k = 0; k < width; ++k) {
    // Rows are scaled at the end: within step k, row k is read only and later rows written only by
    // the lane that owns the column, so one barrier a step is enough.
    const T* row = u + packed_row(n, begin + k) + begin;
    const bool good = row[k] > T(0) && row[k] < infinity;
    const T pivot = good ? row[k] : nan;
    if (lane == k) {
      reciprocal[k] = T(1) / std::sqrt(pivot);
      if (!good && *failed == 0) *failed = begin + k + 1;
    }
    if (lane > k && lane < width) {
      const T ratio = row[lane] / pivot;
      for (int i = k + 1; i <= lane; ++i)
        u[packed_row(n, begin + i) + begin + lane] -= row[i] * ratio;
    }
    group.sync_warp();
  }
  if (lane < width)
    for (int k = 0; k <= lane; ++k) u[packed_row(n, begin + k) + begin + lane] *= reciprocal[k];
}

// The kBlock rows from `begin`, right of their diagonal block: U_kk^T x = a, one column to a lane.
// A copy, transposed, goes to `panel` for the update.
template <typename T, typename Group>
IMU_FAST_DEVICE void factor_panel(const Group& group, T* u, T* panel, const T* reciprocal, int n,
                                  int begin) {
  const int first = begin + kBlock;
  for (int j = first + group.lane(); j < n; j += group.size()) {
    T x[kBlock];
    IMU_FAST_UNROLL
    for (int k = 0; k < kBlock; ++k) x[k] = u[packed_row(n, begin + k) + j];
    IMU_FAST_UNROLL
    for (int k = 0; k < kBlock; ++k) {
      const T* diagonal = u + packed_row(n, begin + k) + begin;
      x[k] *= reciprocal[k];
      IMU_FAST_UNROLL
      for (int i = k + 1; i < kBlock; ++i) x[i] -= diagonal[i] * x[k];
    }
    IMU_FAST_UNROLL
    for (int k = 0; k < kBlock; ++k) u[packed_row(n, begin + k) + j] = x[k];
    store(panel + (j - first) * kPanelStride<T>, x);
  }
}

// a[i, j] -= sum_k panel[i, k] panel[j, k] for first <= i <= j < n: 32 columns to a warp, whose
// column stays in registers while the rows, the same for the whole warp, are broadcast.
template <typename T, typename Group>
IMU_FAST_DEVICE void update_trailing(const Group& group, T* u, const T* panel, int n, int first) {
  const int warp = group.lane() / kWarp, warps = group.size() / kWarp;
  for (int start = first; start < n; start += kWarp) {
    const int j = start + group.lane() % kWarp;
    if (j >= n) continue;
    T right[kBlock];
    load(right, panel + (j - first) * kPanelStride<T>);
    for (int i = first + warp * kRows; i <= j; i += warps * kRows) {
      // Rows beyond j are summed too, into nothing: they lie inside the panel.
      T sum[kRows] = {};
      IMU_FAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        T left[kBlock];
        load(left, panel + (i + r - first) * kPanelStride<T>);
        IMU_FAST_UNROLL
        for (int k = 0; k < kBlock; ++k) sum[r] += left[k] * right[k];
      }
      IMU_FAST_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (i + r <= j) u[packed_row(n, i + r) + j] -= sum[r];
    }
  }
}

// out = upper factor U of a + damping I, for one matrix; a == out factors in place.
//
// a, out: [n, n] row-major; only the upper triangle is read, and written. status: as in
// cholesky_cuda.h. shared: factor_elements<T>(n), aligned to 16 bytes. The group is whole warps.
template <typename T, typename Group>
IMU_FAST_DEVICE void factor_block(const Group& group, const T* a, T* out, int n, T damping,
                                  int* status, T* shared) {
  T* u = shared;
  T* panel = u + round_up(static_cast<int64_t>(n) * (n + 1) / 2, Chunk<T>::width);
  T* reciprocal = panel + n * kPanelStride<T>;
  int* failed = reinterpret_cast<int*>(reciprocal + kBlock);
  const int warp = group.lane() / kWarp, warps = group.size() / kWarp;
  const int within = group.lane() % kWarp;
  if (group.lane() == 0) *failed = 0;
  for (int k = warp; k < n; k += warps)
    for (int j = k + within; j < n; j += kWarp)
      u[packed_row(n, k) + j] = a[k * n + j] + (j == k ? damping : T(0));
  group.sync();
  for (int begin = 0; begin < n; begin += kBlock) {
    const int width = n - begin < kBlock ? n - begin : kBlock;
    if (warp == 0) factor_diagonal(group, u, reciprocal, failed, n, begin, width);
    group.sync();
    // Only a whole block leaves columns behind it.
    factor_panel(group, u, panel, reciprocal, n, begin);
    group.sync();
    update_trailing(group, u, panel, n, begin + kBlock);
    group.sync();
  }
  for (int k = warp; k < n; k += warps)
    for (int j = k + within; j < n; j += kWarp) out[k * n + j] = u[packed_row(n, k) + j];
  if (group.lane() == 0) *status = *failed;
}

// The diagonal block at `begin`, strictly above its diagonal, and the reciprocals of its diagonal;
// continued as the identity beyond n, so that no loop over a block has a bound of its own.
template <typename T, typename Group>
IMU_FAST_DEVICE void stage_diagonal(const Group& group, const T* u, int n, int begin, T* diagonal,
                                    T* reciprocal) {
  for (int e = group.lane(); e < kBlock * kBlock; e += group.size()) {
    const int k = e / kBlock, i = e % kBlock;
    const T value = i >= k && begin + i < n
                        ? u[static_cast<int64_t>(begin + k) * n + begin + i]
                        : T(i == k);
    if (i == k) reciprocal[k] = T(1) / value;
    diagonal[e] = value;
  }
}

// U^T U x = b in place for `columns` right-hand sides of one matrix.
//
// u: [n, n] row-major, upper. b: [columns, n], one right-hand side a row.
// shared: solve_elements<T>(n, columns), aligned to 16 bytes. A lane owns an unknown in the updates
// and a right-hand side in the diagonal blocks.
template <typename T, typename Group>
IMU_FAST_DEVICE void solve_block(const Group& group, const T* u, int n, T* b, int columns,
                                 T* shared) {
  const int stride = rhs_stride<T>(n);
  T* x = shared;
  T* diagonal = x + columns * stride;
  T* reciprocal = diagonal + kBlock * kBlock;
  const int padded = stride - Chunk<T>::width, lane = group.lane();
  for (int r = 0; r < columns; ++r)
    for (int i = lane; i < padded; i += group.size())
      x[r * stride + i] = i < n ? b[static_cast<int64_t>(r) * n + i] : T(0);
  stage_diagonal(group, u, n, 0, diagonal, reciprocal);
  group.sync();

  // Forward, U^T y = b: when a block of y is known, it is taken out of the unknowns after it.
  for (int begin = 0; begin < padded; begin += kBlock) {
    for (int r = lane; r < columns; r += group.size()) {
      T y[kBlock];
      load(y, x + r * stride + begin);
      IMU_FAST_UNROLL
      for (int k = 0; k < kBlock; ++k) {
        y[k] *= reciprocal[k];
        IMU_FAST_UNROLL
        for (int i = k + 1; i < kBlock; ++i) y[i] -= diagonal[k * kBlock + i] * y[k];
      }
      store(x + r * stride + begin, y);
    }
    group.sync();
    const int next = begin + kBlock;
    if (next >= padded) break;  // the last block is staged already: the way back begins with it
    for (int i = next + lane; i < n; i += group.size()) {
      T column[kBlock];
      IMU_FAST_UNROLL
      for (int k = 0; k < kBlock; ++k) column[k] = u[static_cast<int64_t>(begin + k) * n + i];
      for (int r = 0; r < columns; ++r) {
        T y[kBlock], sum = 0;
        load(y, x + r * stride + begin);
        IMU_FAST_UNROLL
        for (int k = 0; k < kBlock; ++k) sum += column[k] * y[k];
        x[r * stride + i] -= sum;
      }
    }
    stage_diagonal(group, u, n, next, diagonal, reciprocal);
    group.sync();
  }

  // Back, U x = y: the same from the last block to the first.
  for (int begin = padded - kBlock; begin >= 0; begin -= kBlock) {
    for (int r = lane; r < columns; r += group.size()) {
      T y[kBlock];
      load(y, x + r * stride + begin);
      IMU_FAST_UNROLL
      for (int k = kBlock - 1; k >= 0; --k) {
        IMU_FAST_UNROLL
        for (int i = k + 1; i < kBlock; ++i) y[k] -= diagonal[k * kBlock + i] * y[i];
        y[k] *= reciprocal[k];
      }
      store(x + r * stride + begin, y);
    }
    group.sync();
    if (begin == 0) break;
    for (int i = lane; i < begin; i += group.size()) {
      T row[kBlock];
      IMU_FAST_UNROLL
      for (int k = 0; k < kBlock; ++k)
        row[k] = begin + k < n ? u[static_cast<int64_t>(i) * n + begin + k] : T(0);
      for (int r = 0; r < columns; ++r) {
        T y[kBlock], sum = 0;
        load(y, x + r * stride + begin);
        IMU_FAST_UNROLL
        for (int k = 0; k < kBlock; ++k) sum += row[k] * y[k];
        x[r * stride + i] -= sum;
      }
    }
    stage_diagonal(group, u, n, begin - kBlock, diagonal, reciprocal);
    group.sync();
  }
  for (int r = 0; r < columns; ++r)
    for (int i = lane; i < n; i += group.size())
      b[static_cast<int64_t>(r) * n + i] = x[r * stride + i];
}

}  // namespace imu_fast
