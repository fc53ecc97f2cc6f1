// total += sum_i (left_i^T right_i)^2, elementwise, with no product in memory.
#pragma once

#include <cstdint>

namespace imu_fast {

// One factor: of sample i, token t and place p it is data[starts[i] + tokens[t] + places[p]].
template <typename T>
struct Factor {
  const T* data;
  const int64_t* starts;
  const int64_t* tokens;
  const int64_t* places;
};

// total [rows, columns], its rows `stride` apart; left has `rows` places, right `columns`. Sample i
// has lengths[i] tokens, the first ones of both factors' tables.
template <typename T>
void squared_products(const Factor<T>& left, const Factor<T>& right, const int64_t* lengths,
                      int64_t samples, T* total, int64_t rows, int64_t columns, int64_t stride,
                      int threads);

}  // namespace imu_fast
