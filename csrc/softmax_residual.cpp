#include "softmax_residual.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "versions.h"

namespace imu_fast {
namespace {

constexpr int64_t AT_ONCE = 1 << 15;  // numbers that one thread takes
constexpr int64_t PIECE = 1024;       // numbers that are summed in T; pieces are summed in double
constexpr int SIDE_BY_SIDE = 32;      // tokens

template <typename T, int BYTES>
struct Rows {
  static constexpr int width = BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(BYTES)));

  static IMU_FAST_INLINE double sum(const T* from, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += PIECE) {
      const int64_t end = std::min(n, start + PIECE);
      Vector one = {}, other = {}, v;
      int64_t i = start;
      for (; i + 2 * width <= end; i += 2 * width) {
        std::memcpy(&v, from + i, sizeof(v));
        one += v;
        std::memcpy(&v, from + i + width, sizeof(v));
        other += v;
      }
      one += other;
      T rest = 0;
      for (; i < end; ++i) rest += from[i];
      for (int lane = 0; lane < width; ++lane) rest += one[lane];
      total += rest;
    }
    return total;
  }

  // -log p of a label, whose p is given, and the others'.
  static IMU_FAST_INLINE T loss(const Residual<T>& of, int64_t i, T p, T others) {
    if (std::isnan(p)) return p;  // so is the whole row
    if (others < T(0.5)) return -std::log1p(-others);
    if (p > std::numeric_limits<T>::min() * T(1024)) return -std::log(p);
    // The largest p is 1 over the normaliser.
    const T *logits = of.logits + i * of.logits_row, *row = of.p + i * of.p_row;
    T logit = logits[0], largest = row[0];
    for (int64_t c = 1; c < of.classes; ++c) {
      logit = std::max(logit, logits[c * of.logits_column]);
      largest = std::max(largest, row[c * of.p_column]);
    }
    return (logit - logits[of.labels[i] * of.logits_column]) - std::log(largest);
  }

  static IMU_FAST_INLINE bool fits(const Residual<T>& of, int64_t i) {
    return of.labels[i] >= 0 && of.labels[i] < of.classes;
  }

  // Tokens whose classes are adjacent, and are changed in place. Returns the first whose label does
  // not fit, or last.
  static IMU_FAST_INLINE int64_t adjacent(const Residual<T>& of, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (!fits(of, i)) return i;
      const T scale = of.scale ? of.scale[i] : T(1);
      T *row = of.delta + i * of.classes, *at = row + of.labels[i];
      const T p = *at;
      *at = T(0);
      const T others = static_cast<T>(sum(row, of.classes));
      of.loss[i] = loss(of, i, p, others) * scale;
      if (of.scale)
        for (int64_t c = 0; c < of.classes; ++c) row[c] *= scale;
      *at = -others * scale;
    }
    return last;
  }

  // The same of tokens that are adjacent, of a few classes.
  static IMU_FAST_INLINE int64_t side_by_side(const Residual<T>& of, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      if (!fits(of, i)) return i;
    for (; first < last; first += SIDE_BY_SIDE) {
      const int count = static_cast<int>(std::min<int64_t>(SIDE_BY_SIDE, last - first));
      T others[SIDE_BY_SIDE] = {}, own[SIDE_BY_SIDE] = {};
      int labels[SIDE_BY_SIDE] = {};
      for (int i = 0; i < count; ++i) labels[i] = static_cast<int>(of.labels[first + i]);
      for (int c = 0; c < of.classes; ++c) {
        const T* p = of.p + first + c * of.p_column;
        for (int i = 0; i < count; ++i) {
          others[i] += labels[i] == c ? T(0) : p[i];
          own[i] = labels[i] == c ? p[i] : own[i];
        }
      }
      for (int i = 0; i < count; ++i) {
        const T scale = of.scale ? of.scale[first + i] : T(1);
        T* row = of.delta + (first + i) * of.classes;
        for (int c = 0; c < of.classes; ++c) row[c] = of.p[first + i + c * of.p_column] * scale;
        of.loss[first + i] = loss(of, first + i, own[i], others[i]) * scale;
        row[labels[i]] = -others[i] * scale;
      }
    }
    return last;
  }

  static IMU_FAST_INLINE int64_t some(const Residual<T>& of, int64_t first, int64_t last) {
    return of.p == of.delta ? adjacent(of, first, last) : side_by_side(of, first, last);
  }
};

template <typename T>
using Routine = int64_t (*)(const Residual<T>&, int64_t, int64_t);

// One version: its name, its instruction set, and the bytes of its vectors.
#define IMU_FAST_VERSION(NAME, TARGET, BYTES)                                  \
  template <typename T>                                                        \
  TARGET int64_t some_##NAME(const Residual<T>& of, int64_t first, int64_t last) { \
    return Rows<T, BYTES>::some(of, first, last);                              \
  }                                                                            \
  template <typename T>                                                        \
  constexpr Routine<T> NAME = some_##NAME<T>;

IMU_FAST_VERSION(plain, , 32)
#ifdef IMU_FAST_X86
IMU_FAST_VERSION(avx2, IMU_FAST_AVX2, 32)
IMU_FAST_VERSION(avx512, IMU_FAST_AVX512, 64)
#endif

}  // namespace

template <typename T>
int64_t softmax_residual(const Residual<T>& of, int threads) {
  const Routine<T> run = IMU_FAST_WIDEST(T);
  const int64_t step = std::max<int64_t>(SIDE_BY_SIDE, AT_ONCE / of.classes);
  std::atomic<int64_t> bad{-1};
  parallel_for((of.n + step - 1) / step, threads, [&](int64_t i) {
    const int64_t last = std::min(of.n, (i + 1) * step), done = run(of, i * step, last);
    if (done < last) bad = done;
  });
  return bad;
}

template int64_t softmax_residual(const Residual<float>&, int);
template int64_t softmax_residual(const Residual<double>&, int);

}  // namespace imu_fast
