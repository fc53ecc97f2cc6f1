// Ascent of a softmax head on cached features: the gradient of a weighted cross-entropy, and steps of
// SGD by it. No logits are stored but those of a block of samples, and chosen samples are read where
// they are.
#pragma once

#include <cstdint>

namespace imu_fast {

template <typename T>
struct Head {
  const T* features;  // sample i at features + i * features_row
  int64_t features_row;
  const int64_t* labels;  // [samples]
  const int64_t* chosen;  // which samples, [n] for each step; null: the first n
  int64_t samples;
  T* theta;  // class c's weights at theta + c * theta_row, then its bias
  int64_t theta_row;
  int64_t n, classes, width;
  bool has_bias;

  int64_t row() const { return width + has_bias; }
};

template <typename T>
struct Rates {
  T lr, momentum, weight_decay, alpha;
};

// Which of `count` chosen samples is none, or has a label that is not in [0, classes); -1: none is.
template <typename T>
int64_t unfit(const Head<T>& of, int64_t count);

// gradient [classes, row()] = sum_i share_i (softmax(z_i) - onehot(y_i)) (x) a~_i and
// loss = -sum_i share_i log p_i, a residual's entry at the label as minus the sum of the others.
template <typename T>
void head_gradient(const Head<T>& of, const T* share, T* gradient, T* loss, int threads);

// With g that gradient for share = -w / sum(w), and its loss before the step plus alpha |theta|_1,
// g += alpha sign(theta) + weight_decay theta, buffer = momentum buffer + g (without one: g),
// theta -= lr buffer; `steps` times, of weights [steps, n]. Losses: [steps].
template <typename T>
void head_ascent(const Head<T>& of, const T* weights, int64_t steps, const Rates<T>& rates,
                 T* buffer, T* losses, int threads);

// The results do not depend on the number of threads.

}  // namespace imu_fast
