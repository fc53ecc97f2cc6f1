// One build for every machine: x86 gets a version for each width of its vectors, chosen at run
// time; elsewhere the plain version serves.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define IMU_FAST_X86
#define IMU_FAST_AVX2 __attribute__((target("arch=x86-64-v3")))
#define IMU_FAST_AVX512 __attribute__((target("arch=x86-64-v4")))
// Of the versions plain<T>, avx2<T> and avx512<T> the widest that this machine runs.
#define IMU_FAST_WIDEST(T)                           \
  (__builtin_cpu_supports("x86-64-v4")   ? avx512<T> \
   : __builtin_cpu_supports("x86-64-v3") ? avx2<T>   \
                                         : plain<T>)
#else
#define IMU_FAST_WIDEST(T) plain<T>
#endif
#define IMU_FAST_INLINE inline __attribute__((always_inline))
// Loops over a tile disappear, so that the tile is in registers.
#define IMU_FAST_UNROLL _Pragma("GCC unroll 16")
