// Damped Cholesky factorisation and solve on the CPU, single and batched.
//
// LAPACK is not linked: the addresses of ?potrf and ?potrs are handed over at run time (from the
// library that torch or scipy brings), so one build serves every installation.
#pragma once

#include <cstdint>

namespace imu_fast {

template <typename T>
using Potrf = void (*)(const char* uplo, const int* n, T* a, const int* lda, int* info);
template <typename T>
using Potrs = void (*)(const char* uplo, const int* n, const int* nrhs, const T* a, const int* lda,
                       T* b, const int* ldb, int* info);
// MKL_Set_Num_Threads_Local, or null where LAPACK is another library.
using SetThreads = int (*)(int);

// Adds damping to each diagonal and factors in place, A + damping I = U^T U.
//
// a: [batch, n, n] row-major, symmetric; its upper triangle is overwritten with U.
// status: [batch]; 0, or the order of the leading minor that is not positive definite.
// threads: matrices factored at the same time; each then runs LAPACK on one thread.
template <typename T>
void damped_factor(Potrf<T> potrf, SetThreads set_threads, T* a, int64_t batch, int n, T damping,
                   int* status, int threads);

// Solves U^T U x = b in place; b: [batch, m, n] row-major, one right-hand side per row.
template <typename T>
void factor_solve(Potrs<T> potrs, SetThreads set_threads, const T* a, int64_t batch, int n, T* b,
                  int m, int threads);

}  // namespace imu_fast
