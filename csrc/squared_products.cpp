#include "squared_products.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "versions.h"

namespace imu_fast {
namespace {

constexpr int64_t LEFT_ELEMENTS = 1 << 22;   // of the left factor that are copied at once
constexpr int64_t CHUNK_TOKENS = 256;         // of whole samples: a panel is in the first cache
constexpr int64_t PANELS = 8;                 // that one thread copies
constexpr int64_t BLOCK_ELEMENTS = 1 << 15;   // of the left factor that are in the second cache

template <typename T>
struct Problem {
  Factor<T> left, right;
  const int64_t* lengths;
  std::vector<int64_t> first;  // [samples + 1]: tokens before each sample
  int64_t samples;
  T* total;
  int64_t rows, columns, stride;
};

// A tile of a sample's product, ROWS x (VECTORS vectors of BYTES), stays in registers over its
// tokens, and is squared into the total's from there.
template <typename T, int BYTES, int ROWS, int VECTORS>
struct Squares {
  static constexpr int width = BYTES / sizeof(T), COLUMNS = width * VECTORS;
  typedef T Vector __attribute__((vector_size(BYTES), may_alias, aligned(sizeof(T))));

  // Some samples' tokens in a panel of WIDE places from `place` on: [tokens, WIDE], zeros beyond.
  template <int WIDE>
  static IMU_FAST_INLINE void pack(const Factor<T>& from, const Problem<T>& p, int64_t sample,
                                   int64_t last, int64_t place, int64_t places, T* to) {
    const int64_t count = std::min<int64_t>(WIDE, places - place);
    const int64_t* at = from.places + place;
    bool together = count == WIDE;
    for (int k = 1; k < count; ++k) together &= at[k] == at[0] + k;
    for (; sample < last; ++sample) {
      const T* base = from.data + from.starts[sample];
      const int64_t length = p.lengths[sample];
      if (together) {
        for (int64_t t = 0; t < length; ++t)
          std::memcpy(to + t * WIDE, base + from.tokens[t] + at[0], WIDE * sizeof(T));
      } else {
        for (int64_t k = 0; k < count; ++k) {
          const T* column = base + at[k];
          for (int64_t t = 0; t < length; ++t) to[t * WIDE + k] = column[from.tokens[t]];
        }
        for (int64_t k = count; k < WIDE; ++k)
          for (int64_t t = 0; t < length; ++t) to[t * WIDE + k] = T(0);
      }
      to += length * WIDE;
    }
  }

  // Adds the squares of samples whose panels are left [tokens, ROWS] and right [tokens, COLUMNS].
  static IMU_FAST_INLINE void tile(const T* left, const T* right, const int64_t* lengths,
                                   int64_t count, T* total, int64_t stride, int64_t high,
                                   int64_t wide) {
    alignas(64) T sums[ROWS * COLUMNS] = {};
    for (int64_t r = 0; r < high; ++r)  // it is in memory by the time that it is added to
      for (int64_t c = 0; c < wide; c += 64 / sizeof(T))
        __builtin_prefetch(total + r * stride + c, 1);
    for (int64_t i = 0; i < count; ++i) {
      Vector product[ROWS][VECTORS] = {};
      for (int64_t t = 0; t < lengths[i]; ++t, left += ROWS, right += COLUMNS) {
        const Vector* row = reinterpret_cast<const Vector*>(right);
        IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
          IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v) product[r][v] += left[r] * row[v];
      }
      IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
        IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v) {
          Vector& sum = reinterpret_cast<Vector*>(sums)[r * VECTORS + v];
          sum = product[r][v] * product[r][v] + sum;
        }
    }
    if (high == ROWS && wide == COLUMNS)
      IMU_FAST_UNROLL for (int r = 0; r < ROWS; ++r)
        IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v) {
          Vector& sum = reinterpret_cast<Vector*>(total + r * stride)[v];
          sum += reinterpret_cast<const Vector*>(sums)[r * VECTORS + v];
        }
    else
      for (int64_t r = 0; r < high; ++r)
        for (int64_t c = 0; c < wide; ++c) total[r * stride + c] += sums[r * COLUMNS + c];
  }

  // The left panels of rows [row, last), of all samples: side by side, since lines are shared.
  static IMU_FAST_INLINE void pack_left(const Problem<T>& p, int64_t row, int64_t last, T* to) {
    const int64_t all = p.first[p.samples];
    for (int64_t i = 0; i < p.samples; ++i)
      for (int64_t r = row; r < last; r += ROWS)
        pack<ROWS>(p.left, p, i, i + 1, r, p.rows, to + (r - row) * all + p.first[i] * ROWS);
  }

  // Columns [begin, end) of rows [row, last), whose left panels are packed.
  static IMU_FAST_INLINE void strip(const Problem<T>& p, const T* left, int64_t row, int64_t last,
                                    int64_t begin, int64_t end, std::vector<T>& memory) {
    const int64_t all = p.first[p.samples];
    for (int64_t sample = 0, next; sample < p.samples; sample = next) {
      const int64_t before = p.first[sample];
      next = sample + 1;
      while (next < p.samples && p.first[next + 1] - before <= CHUNK_TOKENS) ++next;
      const int64_t tokens = p.first[next] - before;
      if (tokens == 0) continue;
      memory.resize(std::max<size_t>(memory.size(), tokens * (end - begin + COLUMNS)));
      for (int64_t c = begin; c < end; c += COLUMNS)
        pack<COLUMNS>(p.right, p, sample, next, c, p.columns, memory.data() + (c - begin) * tokens);
      const int64_t held = std::max<int64_t>(1, BLOCK_ELEMENTS / (tokens * ROWS)) * ROWS;
      for (int64_t top = row; top < last; top += held) {
        const int64_t bottom = std::min(last, top + held);
        for (int64_t c = begin; c < end; c += COLUMNS)
          for (int64_t r = top; r < bottom; r += ROWS)
            tile(left + (r - row) * all + before * ROWS, memory.data() + (c - begin) * tokens,
                 p.lengths + sample, next - sample, p.total + r * p.stride + c, p.stride,
                 std::min<int64_t>(ROWS, bottom - r), std::min<int64_t>(COLUMNS, end - c));
      }
    }
  }
};

template <typename T>
struct Routines {
  int64_t rows, columns;
  void (*pack_left)(const Problem<T>&, int64_t, int64_t, T*);
  void (*strip)(const Problem<T>&, const T*, int64_t, int64_t, int64_t, int64_t, std::vector<T>&);
};

// One version: its name, its instruction set, and BYTES, ROWS, VECTORS.
#define IMU_FAST_VERSION(NAME, TARGET, ...)                                                       \
  template <typename T>                                                                           \
  TARGET void pack_##NAME(const Problem<T>& p, int64_t row, int64_t last, T* to) {                \
    Squares<T, __VA_ARGS__>::pack_left(p, row, last, to);                                         \
  }                                                                                               \
  template <typename T>                                                                           \
  TARGET void strip_##NAME(const Problem<T>& p, const T* left, int64_t row, int64_t last,         \
                           int64_t begin, int64_t end, std::vector<T>& memory) {                  \
    Squares<T, __VA_ARGS__>::strip(p, left, row, last, begin, end, memory);                       \
  }                                                                                               \
  template <typename T>                                                                           \
  constexpr Routines<T> NAME = {                                                                  \
      Rows<__VA_ARGS__>::value, Squares<T, __VA_ARGS__>::COLUMNS, pack_##NAME<T>, strip_##NAME<T>};

template <int BYTES, int ROWS, int VECTORS>
struct Rows {
  static constexpr int value = ROWS;
};

IMU_FAST_VERSION(plain, , 16, 4, 2)
#ifdef IMU_FAST_X86
IMU_FAST_VERSION(avx2, IMU_FAST_AVX2, 32, 6, 2)
IMU_FAST_VERSION(avx512, IMU_FAST_AVX512, 64, 12, 2)
#endif

}  // namespace

template <typename T>
void squared_products(const Factor<T>& left, const Factor<T>& right, const int64_t* lengths,
                      int64_t samples, T* total, int64_t rows, int64_t columns, int64_t stride,
                      int threads) {
  const Routines<T>& run = IMU_FAST_WIDEST(T);
  Problem<T> p{left, right, lengths, {0}, samples, total, rows, columns, stride};
  for (int64_t i = 0; i < samples; ++i) p.first.push_back(p.first.back() + lengths[i]);
  const int64_t all = p.first.back();
  if (all == 0 || rows == 0 || columns == 0) return;
  const int64_t held = std::max<int64_t>(1, LEFT_ELEMENTS / (all * run.rows));
  const int64_t block = std::min(quotient_up(rows, run.rows), held) * run.rows;
  const std::unique_ptr<T[]> packed(new T[block * all]);
  // Strips enough for threads to end together, yet wide.
  const int64_t panels = quotient_up(columns, run.columns);
  const int64_t wide =
      std::max<int64_t>(1, std::min(PANELS, panels / (4 * std::max(1, threads)))) * run.columns;
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t last = std::min(rows, row + block);
    parallel_for(quotient_up(last - row, PANELS * run.rows), threads, [&](int64_t i) {
      const int64_t begin = row + i * PANELS * run.rows;
      const int64_t end = std::min(last, begin + PANELS * run.rows);
      run.pack_left(p, begin, end, packed.get() + (begin - row) * all);
    });
    parallel_for(quotient_up(columns, wide), threads, [&](int64_t i) {
      thread_local std::vector<T> memory;
      run.strip(p, packed.get(), row, last, i * wide, std::min(columns, (i + 1) * wide), memory);
    });
  }
}

template void squared_products(const Factor<float>&, const Factor<float>&, const int64_t*, int64_t,
                               float*, int64_t, int64_t, int64_t, int);
template void squared_products(const Factor<double>&, const Factor<double>&, const int64_t*,
                               int64_t, double*, int64_t, int64_t, int64_t, int);

}  // namespace imu_fast
