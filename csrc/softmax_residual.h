// What is left of a softmax residual once the softmax is there: the label's entry, and the loss.
#pragma once

#include <cstdint>

namespace imu_fast {

template <typename T>
struct Residual {
  const T* p;  // softmax of the logits: token i, class c at p[i * row + c * column]
  int64_t p_row, p_column;
  const T* logits;
  int64_t logits_row, logits_column;
  const int64_t* labels;  // [n]
  const T* scale;         // [n], or null
  T* delta;               // [n, classes] row-major; may be p, where that is so
  T* loss;                // [n]
  int64_t n, classes;
};

// delta = scale (p - onehot), its label's entry as minus the sum of the others; loss = -scale log p
// of the label, from that sum where the label has more than half, from the logits where p of it
// underflows. Returns a token whose label is not in [0, classes), or -1; then all is done.
template <typename T>
int64_t softmax_residual(const Residual<T>& of, int threads);

}  // namespace imu_fast
