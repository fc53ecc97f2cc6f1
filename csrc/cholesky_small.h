// Damped Cholesky of small matrices, where LAPACK's overhead exceeds its work: no library, one
// thread for each matrix of the batch.
#pragma once

#include <cstdint>

namespace imu_fast {

// u = upper factor of a + damping I, row-major; its strict lower triangle is not used.
//
// a, u: [batch, n, n]; a == u factors in place. Only the upper triangle is read.
// status: [batch]; 0, or the order of the leading minor that is not positive definite or not finite.
// Such a factor's first element is NaN, and so is all that is solved with it.
template <typename T>
void small_factor(const T* a, T* u, int64_t batch, int n, T damping, int* status, int threads);

// Solves u^T u x = b in place; b: [batch, m, n] row-major, one right-hand side per row.
template <typename T>
void small_solve(const T* u, int64_t batch, int n, T* b, int m, int threads);

// x = (a + damping I)^-1 b, whose factor nobody keeps; a: [batch, n, n], b and x: [batch, n, m]
// row-major, one right-hand side per column. Returns whether all of x is a finite number: where a
// matrix is not positive definite, or something is not finite, it is not.
template <typename T>
bool small_damped_solve(const T* a, const T* b, T* x, int64_t batch, int n, int m, T damping,
                        int threads);

}  // namespace imu_fast
