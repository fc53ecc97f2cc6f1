// What offsets [n + 1] of packed tokens say of n >= 1 samples, in one pass.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace imu_fast {

// The first and the last offset, the fewest and the most tokens of a sample.
inline std::array<int64_t, 4> lengths(const int64_t* offsets, int64_t n) {
  const auto length = [&](int64_t i) {  // of what a user passed: whatever it is
    return static_cast<int64_t>(static_cast<uint64_t>(offsets[i + 1]) - offsets[i]);
  };
  int64_t fewest = length(0), most = fewest;
  for (int64_t i = 1; i < n; ++i) {
    const int64_t count = length(i);
    fewest = std::min(fewest, count);
    most = std::max(most, count);
  }
  return {offsets[0], offsets[n], fewest, most};
}

}  // namespace imu_fast
