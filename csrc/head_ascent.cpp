#include "head_ascent.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "versions.h"

namespace imu_fast {
namespace {

constexpr int64_t BLOCK = 256;  // samples whose residuals are stored at once, and sums in registers
constexpr int64_t PIECE = 32;   // classes whose sum is a term of the sum of all
constexpr int64_t STRIP = 128;  // columns of the gradient that one thread makes

// Some samples' rows, and their residuals.
template <typename T>
struct Block {
  const Head<T>& head;
  const T* const* rows;  // [n]
  const int64_t* labels;
  const T* share;
  T* residual;  // [classes, BLOCK]
  T* gradient;  // [classes, head.row()]
  double* loss;
  int64_t n;
};

// Tiles of ROWS classes x (VECTORS vectors of BYTES), of samples or of columns, in registers.
template <typename T, int BYTES, int ROWS, int VECTORS>
struct Tiles {
  static constexpr int width = BYTES / sizeof(T), WIDE = width * VECTORS;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(BYTES), may_alias, aligned(sizeof(T))));
  typedef Int Lanes __attribute__((vector_size(BYTES)));

  static IMU_FAST_INLINE Vector& at(T* where) { return *reinterpret_cast<Vector*>(where); }
  static IMU_FAST_INLINE const Vector& at(const T* where) {
    return *reinterpret_cast<const Vector*>(where);
  }

  // exp(x), x <= 0, to two units in the last place; NaN stays, and what is too small is 0.
  // x = k log 2 + r: 2^k by its bits, in two halves so that subnormal results are reached; exp(r),
  // |r| <= log(2) / 2, by its series.
  static IMU_FAST_INLINE void exponential(Vector& x) {
    constexpr bool single = sizeof(T) == 4;
    constexpr int bits = single ? 23 : 52, bias = single ? 127 : 1023, terms = single ? 7 : 13;
    constexpr T low = single ? T(-104) : T(-746), shift = T(Int(3) << (bits - 1));
    // log 2 = high + rest, high so short that k times it is exact.
    constexpr T high = single ? T(0.693359375) : T(0x1.62e42fee00000p-1);
    constexpr T rest = single ? T(-2.12194440e-4) : T(0x1.a39ef35793c76p-33);
    const Vector lowest = Vector{} + low, magic = Vector{} + shift;
    x = x < lowest ? lowest : x;
    const Vector shifted = x * T(1.44269504088896340736) + magic;  // its last bits are k
    const Vector k = shifted - magic, r = (x - k * high) - k * rest;
    Vector series = Vector{} + T(1);
    IMU_FAST_UNROLL for (int i = terms; i > 0; --i) series = series * r * T(1.0 / i) + T(1);
    const Lanes exponent = reinterpret_cast<Lanes>(shifted) - reinterpret_cast<Lanes>(magic);
    const Lanes half = exponent >> 1;
    const Lanes one = (half + bias) << bits, other = (exponent - half + bias) << bits;
    x = series * reinterpret_cast<Vector>(one) * reinterpret_cast<Vector>(other);
  }

  // A square of vectors: blocks of HALF lanes change places, ever larger ones.
  template <int HALF = 1>
  static IMU_FAST_INLINE void transpose(Vector (&v)[width]) {
    Lanes even, odd;
    IMU_FAST_UNROLL for (int lane = 0; lane < width; ++lane) {
      even[lane] = lane & HALF ? width + lane - HALF : lane;
      odd[lane] = lane & HALF ? width + lane : lane + HALF;
    }
    IMU_FAST_UNROLL for (int i = 0; i < width; ++i) {
      if (i & HALF) continue;
      const Vector one = v[i], other = v[i + HALF];
      v[i] = __builtin_shuffle(one, other, even);
      v[i + HALF] = __builtin_shuffle(one, other, odd);
    }
    if constexpr (2 * HALF < width) transpose<2 * HALF>(v);
  }

  // Samples [first, first + WIDE) side by side: [length, WIDE]. The last is repeated beyond n.
  static IMU_FAST_INLINE void pack(const Block<T>& b, int64_t first, int64_t length, T* to) {
    for (int v = 0; v < VECTORS; ++v) {
      const T* rows[width];
      for (int j = 0; j < width; ++j)
        rows[j] = b.rows[std::min(first + v * width + j, b.n - 1)];
      int64_t k = 0;
      for (; k + width <= length; k += width) {
        Vector square[width];
        IMU_FAST_UNROLL for (int j = 0; j < width; ++j) square[j] = at(rows[j] + k);
        transpose(square);
        IMU_FAST_UNROLL for (int j = 0; j < width; ++j)
          at(to + (k + j) * WIDE + v * width) = square[j];
      }
      for (; k < length; ++k)
        for (int j = 0; j < width; ++j) to[k * WIDE + v * width + j] = rows[j][k];
    }
  }

  // Logits of WIDE samples that are packed, for classes [c, c + ROWS).
  static IMU_FAST_INLINE void logits(const Block<T>& b, const T* packed, int64_t c, T* to) {
    const Head<T>& h = b.head;
    const T* theta[ROWS];
    for (int r = 0; r < ROWS; ++r)
      theta[r] = h.theta + std::min(c + r, h.classes - 1) * h.theta_row;
    Vector sum[ROWS][VECTORS];
    IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
      IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v)
        sum[r][v] = Vector{} + (h.has_bias ? theta[r][h.width] : T(0));
    for (int64_t k = 0; k < h.width; ++k, packed += WIDE) {
      IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
        IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v)
          sum[r][v] += theta[r][k] * at(packed + v * width);
    }
    const int64_t count = std::min<int64_t>(ROWS, h.classes - c);
    IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r) {
      if (r >= count) break;
      IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v)
        at(to + (c + r) * BLOCK + v * width) = sum[r][v];
    }
  }

  // Residuals of samples [first, first + WIDE) and their losses.
  static IMU_FAST_INLINE void residuals(const Block<T>& b, int64_t first, std::vector<T>& memory) {
    const Head<T>& h = b.head;
    memory.resize(h.width * WIDE);
    pack(b, first, h.width, memory.data());
    T* row = b.residual + first;  // of the first class
    for (int64_t c = 0; c < h.classes; c += ROWS) logits(b, memory.data(), c, row);
    const int count = static_cast<int>(std::min<int64_t>(WIDE, b.n - first));
    const auto at_label = [&](int i) -> T& { return row[b.labels[first + i] * BLOCK + i]; };
    T logit[WIDE], own[WIDE], largest[WIDE], others[WIDE], scale[WIDE] = {};
    for (int i = 0; i < count; ++i) logit[i] = at_label(i);
    IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v) {
      Vector most = at(row + v * width);
      for (int64_t c = 1; c < h.classes; ++c) {
        const Vector& z = at(row + c * BLOCK + v * width);
        most = most >= z ? most : z;
      }
      at(largest + v * width) = most;
      for (int64_t c = 0; c < h.classes; ++c) {
        Vector& z = at(row + c * BLOCK + v * width);
        z -= most;
        exponential(z);
      }
    }
    for (int i = 0; i < count; ++i) {
      own[i] = at_label(i);
      at_label(i) = T(0);
    }
    IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v) {
      Vector sum = {};
      for (int64_t c = 0; c < h.classes;) {
        Vector some = {};
        for (const int64_t end = std::min(h.classes, c + PIECE); c < end; ++c)
          some += at(row + c * BLOCK + v * width);
        sum += some;
      }
      at(others + v * width) = sum;
    }
    for (int i = 0; i < count; ++i) scale[i] = b.share[first + i] / (others[i] + own[i]);
    IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v)
      for (int64_t c = 0; c < h.classes; ++c)
        at(row + c * BLOCK + v * width) *= at(scale + v * width);
    for (int i = 0; i < count; ++i) {
      const T total = others[i] + own[i], wrong = others[i] / total;
      at_label(i) = -others[i] * scale[i];
      const T loss =
          wrong < T(0.5) ? -std::log1p(-wrong) : (largest[i] - logit[i]) + std::log(total);
      b.loss[first + i] = static_cast<double>(loss) * b.share[first + i];
    }
  }

  // Adds V vectors of columns from `column` on of classes [c, c + ROWS), but for the first `had`.
  template <int V>
  static IMU_FAST_INLINE void sums(const Block<T>& b, int64_t c, int64_t column, int64_t had = 0) {
    const Head<T>& h = b.head;
    const T* residual[ROWS];
    for (int r = 0; r < ROWS; ++r)
      residual[r] = b.residual + std::min(c + r, h.classes - 1) * BLOCK;
    Vector sum[ROWS][V] = {};
    for (int64_t i = 0; i < b.n; ++i) {
      const T* x = b.rows[i] + column;
      IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
        IMU_FAST_UNROLL for (int v = 0; v < V; ++v) sum[r][v] += residual[r][i] * at(x + v * width);
    }
    const int64_t count = std::min<int64_t>(ROWS, h.classes - c);
    T* to = b.gradient + c * h.row() + column;
    IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r, to += h.row()) {
      if (r >= count) break;
      if (had == 0)
        IMU_FAST_UNROLL for (int v = 0; v < V; ++v) at(to + v * width) += sum[r][v];
      else
        for (int64_t lane = had; lane < width; ++lane) to[lane] += sum[r][0][lane];
    }
  }

  // Adds columns [begin, end) of the features' gradient.
  static IMU_FAST_INLINE void strip(const Block<T>& b, int64_t begin, int64_t end) {
    const Head<T>& h = b.head;
    for (int64_t c = 0; c < h.classes; c += ROWS) {
      int64_t k = begin;
      for (; k + WIDE <= end; k += WIDE) sums<VECTORS>(b, c, k);
      for (; k + width <= end; k += width) sums<1>(b, c, k);
      if (k < end && h.width >= width) {
        sums<1>(b, c, end - width, k - (end - width));
        continue;
      }
      for (int64_t j = c; j < std::min(h.classes, c + ROWS); ++j)
        for (int64_t q = k; q < end; ++q) {
          T sum = 0;
          for (int64_t i = 0; i < b.n; ++i) sum += b.residual[j * BLOCK + i] * b.rows[i][q];
          b.gradient[j * h.row() + q] += sum;
        }
    }
  }
};

template <typename T>
struct Routines {
  int wide;
  void (*residuals)(const Block<T>&, int64_t, std::vector<T>&);
  void (*strip)(const Block<T>&, int64_t, int64_t);
};

// One version: its name, its instruction set, and BYTES, ROWS, VECTORS.
#define IMU_FAST_VERSION(NAME, TARGET, ...)                                                     \
  template <typename T>                                                                         \
  TARGET void residuals_##NAME(const Block<T>& b, int64_t first, std::vector<T>& memory) {      \
    Tiles<T, __VA_ARGS__>::residuals(b, first, memory);                                         \
  }                                                                                             \
  template <typename T>                                                                         \
  TARGET void strip_##NAME(const Block<T>& b, int64_t begin, int64_t end) {                     \
    Tiles<T, __VA_ARGS__>::strip(b, begin, end);                                                \
  }                                                                                             \
  template <typename T>                                                                         \
  constexpr Routines<T> NAME = {Tiles<T, __VA_ARGS__>::WIDE, residuals_##NAME<T>, strip_##NAME<T>};

IMU_FAST_VERSION(plain, , 16, 4, 2)
#ifdef IMU_FAST_X86
IMU_FAST_VERSION(avx2, IMU_FAST_AVX2, 32, 6, 2)
IMU_FAST_VERSION(avx512, IMU_FAST_AVX512, 64, 12, 2)
#endif

// What a gradient needs beside its operands.
template <typename T>
struct Workspace {
  explicit Workspace(const Head<T>& of)
      : rows(of.n), labels(of.n), losses(of.n), biases(of.classes),
        residual(new T[of.classes * BLOCK]) {}

  void gradient(const Head<T>& of, const T* share, T* to, T* loss, int threads) {
    for (int64_t i = 0; i < of.n; ++i) {
      const int64_t sample = of.chosen ? of.chosen[i] : i;
      rows[i] = of.features + sample * of.features_row;
      labels[i] = of.labels[sample];
    }
    std::fill_n(to, of.classes * of.row(), T(0));
    std::fill(biases.begin(), biases.end(), 0);
    for (int64_t first = 0; first < of.n; first += BLOCK) {
      const int64_t n = std::min(BLOCK, of.n - first);
      const Block<T> block{of, rows.data() + first, labels.data() + first, share + first,
                           residual.get(), to, losses.data() + first, n};
      parallel_for(quotient_up(n, run.wide), threads, [&](int64_t i) {
        thread_local std::vector<T> memory;
        run.residuals(block, i * run.wide, memory);
      });
      parallel_for(quotient_up(of.width, STRIP), threads, [&](int64_t i) {
        run.strip(block, i * STRIP, std::min(of.width, (i + 1) * STRIP));
      });
      for (int64_t c = 0; c < of.classes && of.has_bias; ++c)
        for (int64_t i = 0; i < n; ++i) biases[c] += residual[c * BLOCK + i];
    }
    for (int64_t c = 0; c < of.classes && of.has_bias; ++c)
      to[c * of.row() + of.width] = static_cast<T>(biases[c]);
    double total = 0;
    for (const double one : losses) total += one;
    *loss = static_cast<T>(total);
  }

  const Routines<T>& run = IMU_FAST_WIDEST(T);
  std::vector<const T*> rows;
  std::vector<int64_t> labels;
  std::vector<double> losses, biases;
  std::unique_ptr<T[]> residual;
};

// One step of SGD; returns |theta|_1 before it, which only alpha asks for.
template <typename T>
double update(const Head<T>& of, const Rates<T>& rates, const T* gradient, T* buffer) {
  double size = 0;
  for (int64_t c = 0; c < of.classes; ++c) {
    T* theta = of.theta + c * of.theta_row;
    const T* g = gradient + c * of.row();
    T* moved = buffer ? buffer + c * of.row() : nullptr;
    for (int64_t k = 0; k < of.row(); ++k) {
      T step = g[k];
      if (rates.alpha != T(0)) {
        size += std::abs(theta[k]);
        step += rates.alpha * static_cast<T>((theta[k] > T(0)) - (theta[k] < T(0)));
      }
      step += rates.weight_decay * theta[k];
      if (moved) step = moved[k] = moved[k] * rates.momentum + step;
      theta[k] -= rates.lr * step;
    }
  }
  return size;
}

}  // namespace

template <typename T>
int64_t unfit(const Head<T>& of, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sample = of.chosen ? of.chosen[i] : i;
    if (sample < 0 || sample >= of.samples) return i;
    if (of.labels[sample] < 0 || of.labels[sample] >= of.classes) return i;
  }
  return -1;
}

template <typename T>
void head_gradient(const Head<T>& of, const T* share, T* gradient, T* loss, int threads) {
  Workspace<T>(of).gradient(of, share, gradient, loss, threads);
}

template <typename T>
void head_ascent(const Head<T>& of, const T* weights, int64_t steps, const Rates<T>& rates,
                 T* buffer, T* losses, int threads) {
  Workspace<T> workspace(of);
  std::vector<T> share(of.n), gradient(of.classes * of.row());
  Head<T> at = of;
  for (int64_t step = 0; step < steps; ++step, weights += of.n) {
    double sum = 0;
    for (int64_t i = 0; i < of.n; ++i) sum += weights[i];
    for (int64_t i = 0; i < of.n; ++i) share[i] = static_cast<T>(-weights[i] / sum);
    at.chosen = of.chosen ? of.chosen + step * of.n : nullptr;
    workspace.gradient(at, share.data(), gradient.data(), losses + step, threads);
    const double size = update(at, rates, gradient.data(), buffer);
    losses[step] += static_cast<T>(rates.alpha * size);
  }
}

template int64_t unfit(const Head<float>&, int64_t);
template int64_t unfit(const Head<double>&, int64_t);
template void head_gradient(const Head<float>&, const float*, float*, float*, int);
template void head_gradient(const Head<double>&, const double*, double*, double*, int);
template void head_ascent(const Head<float>&, const float*, int64_t, const Rates<float>&, float*,
                          float*, int);
template void head_ascent(const Head<double>&, const double*, int64_t, const Rates<double>&,
                          double*, double*, int);

}  // namespace imu_fast
