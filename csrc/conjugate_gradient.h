// The vector updates and dot products of one iteration of conjugate gradient, m systems of n numbers.
#pragma once

#include <cstdint>

namespace imu_fast {

// Vectors are [m, n] row-major, the others one number for each system.
template <typename T>
struct Systems {
  T *x, *r, *p;   // solution, residual, direction: changed
  const T* mp;    // M p
  T *rho, *size;  // r.z and r.r: changed
  const T* goal;  // where r.r is small enough
  T* step;        // is written
  int64_t m, n;
};

// step = rho / p.Mp where that is positive and size above goal, else 0; x += step p, r -= step Mp,
// size = r.r. With `turns` the direction too: z is r.
template <typename T>
void advance(const Systems<T>& s, bool turns, int threads);

// p = z + (r.z / rho) p where step is not 0; rho = r.z.
template <typename T>
void turn(const Systems<T>& s, const T* z, int threads);

}  // namespace imu_fast
