#include "conjugate_gradient.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "versions.h"

namespace imu_fast {
namespace {

// Numbers that are summed in T, in lanes; pieces are summed in double, in order, so the threads'
// number changes no bit.
constexpr int64_t PIECE = 4096;

template <typename T, int BYTES>
struct Lanes {
  static constexpr int width = BYTES / sizeof(T), VECTORS = 4, step = width * VECTORS;
  typedef T Vector __attribute__((vector_size(BYTES), may_alias, aligned(sizeof(T))));

  // Vector v of those that begin at an address.
  static IMU_FAST_INLINE Vector& at(T* address, int v) {
    return *reinterpret_cast<Vector*>(address + v * width);
  }
  static IMU_FAST_INLINE const Vector& at(const T* address, int v) {
    return *reinterpret_cast<const Vector*>(address + v * width);
  }

  static IMU_FAST_INLINE double sum(const Vector (&parts)[VECTORS]) {
    const Vector all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    double total = 0;
    for (int lane = 0; lane < width; ++lane) total += all[lane];
    return total;
  }

  static IMU_FAST_INLINE double dot(const T* a, const T* b, int64_t n) {
    Vector parts[VECTORS] = {};
    int64_t i = 0;
    for (; i + step <= n; i += step)
      IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v) parts[v] += at(a + i, v) * at(b + i, v);
    T rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return sum(parts) + rest;
  }

  static IMU_FAST_INLINE double advance(T* x, T* r, const T* p, const T* mp, T by, int64_t n) {
    Vector parts[VECTORS] = {};
    int64_t i = 0;
    for (; i + step <= n; i += step)
      IMU_FAST_UNROLL for (int v = 0; v < VECTORS; ++v) {
        Vector& residual = at(r + i, v);
        at(x + i, v) += by * at(p + i, v);
        residual -= by * at(mp + i, v);
        parts[v] += residual * residual;
      }
    T rest = 0;
    for (; i < n; ++i) {
      x[i] += by * p[i];
      r[i] -= by * mp[i];
      rest += r[i] * r[i];
    }
    return sum(parts) + rest;
  }

  static IMU_FAST_INLINE void turn(T* p, const T* z, T by, T share, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = by * p[i] + share * z[i];
  }
};

template <typename T>
struct Routines {
  double (*dot)(const T*, const T*, int64_t);
  double (*advance)(T*, T*, const T*, const T*, T, int64_t);
  void (*turn)(T*, const T*, T, T, int64_t);
};

// One version: its name, its instruction set, and the bytes of its vectors.
#define IMU_FAST_VERSION(NAME, TARGET, BYTES)                                                  \
  template <typename T>                                                                        \
  TARGET double dot_##NAME(const T* a, const T* b, int64_t n) {                                \
    return Lanes<T, BYTES>::dot(a, b, n);                                                      \
  }                                                                                            \
  template <typename T>                                                                        \
  TARGET double advance_##NAME(T* x, T* r, const T* p, const T* mp, T by, int64_t n) {         \
    return Lanes<T, BYTES>::advance(x, r, p, mp, by, n);                                       \
  }                                                                                            \
  template <typename T>                                                                        \
  TARGET void turn_##NAME(T* p, const T* z, T by, T share, int64_t n) {                        \
    Lanes<T, BYTES>::turn(p, z, by, share, n);                                                 \
  }                                                                                            \
  template <typename T>                                                                        \
  constexpr Routines<T> NAME = {dot_##NAME<T>, advance_##NAME<T>, turn_##NAME<T>};

IMU_FAST_VERSION(plain, , 32)
#ifdef IMU_FAST_X86
IMU_FAST_VERSION(avx2, IMU_FAST_AVX2, 32)
IMU_FAST_VERSION(avx512, IMU_FAST_AVX512, 64)
#endif

// The sum of part(first, count) over the pieces of [0, n).
template <typename Part>
double over_pieces(int64_t n, int threads, const Part& part) {
  const int64_t pieces = (n + PIECE - 1) / PIECE;
  const auto one = [&](int64_t i) { return part(i * PIECE, std::min(PIECE, n - i * PIECE)); };
  double total = 0;
  if (threads <= 1) {
    for (int64_t i = 0; i < pieces; ++i) total += one(i);
    return total;
  }
  std::vector<double> found(pieces);
  parallel_for(pieces, threads, [&](int64_t i) { found[i] = one(i); });
  return std::accumulate(found.begin(), found.end(), total);
}

template <typename T>
struct Iteration {
  const Systems<T>& s;
  const Routines<T>& run;

  void advance(int64_t j, int threads) const {
    const int64_t row = j * s.n;
    T *x = s.x + row, *r = s.r + row, *p = s.p + row;
    const T* mp = s.mp + row;
    const T curvature = static_cast<T>(over_pieces(
        s.n, threads, [&](int64_t i, int64_t count) { return run.dot(p + i, mp + i, count); }));
    const T by = curvature > T(0) && s.size[j] > s.goal[j] ? s.rho[j] / curvature : T(0);
    s.step[j] = by;
    s.size[j] = static_cast<T>(over_pieces(s.n, threads, [&](int64_t i, int64_t count) {
      return run.advance(x + i, r + i, p + i, mp + i, by, count);
    }));
  }

  void turn(int64_t j, const T* z, T rho, int threads) const {
    T* p = s.p + j * s.n;
    z += j * s.n;
    const bool moved = s.step[j] != T(0);
    const T by = moved ? rho / s.rho[j] : T(1);
    s.rho[j] = rho;
    over_pieces(s.n, threads, [&](int64_t i, int64_t count) {
      run.turn(p + i, z + i, by, moved ? T(1) : T(0), count);
      return 0.0;
    });
  }

  // Of each system, whole ones on each thread where there are as many.
  template <typename Body>
  void each(int threads, const Body& body) const {
    const bool whole = s.m >= threads;
    parallel_for(s.m, whole ? threads : 1, [&](int64_t j) { body(j, whole ? 1 : threads); });
  }
};

}  // namespace

template <typename T>
void advance(const Systems<T>& s, bool turns, int threads) {
  const Iteration<T> it{s, IMU_FAST_WIDEST(T)};
  it.each(threads, [&](int64_t j, int own) {
    it.advance(j, own);
    if (turns) it.turn(j, s.r, s.size[j], own);
  });
}

template <typename T>
void turn(const Systems<T>& s, const T* z, int threads) {
  const Iteration<T> it{s, IMU_FAST_WIDEST(T)};
  it.each(threads, [&](int64_t j, int own) {
    const T *r = s.r + j * s.n, *at = z + j * s.n;
    const double rho = over_pieces(s.n, own, [&](int64_t i, int64_t count) {
      return it.run.dot(r + i, at + i, count);
    });
    it.turn(j, z, static_cast<T>(rho), own);
  });
}

template void advance(const Systems<float>&, bool, int);
template void advance(const Systems<double>&, bool, int);
template void turn(const Systems<float>&, const float*, int);
template void turn(const Systems<double>&, const double*, int);

}  // namespace imu_fast
