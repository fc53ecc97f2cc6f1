// A loop over independent items on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace imu_fast {

// Runs body(i) for i in [0, count), taken one by one by `threads` threads; `enter` and `leave` run
// once on each of them.
template <typename Body, typename Enter, typename Leave>
void parallel_for(int64_t count, int threads, const Body& body, const Enter& enter,
                  const Leave& leave) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const auto state = enter();
    for (int64_t i = next++; i < count; i = next++) body(i);
    leave(state);
  };
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; ++t) pool.emplace_back(work);
  } catch (...) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  work();
  for (auto& thread : pool) thread.join();
}

template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  parallel_for(count, threads, body, [] { return 0; }, [](int) {});
}

}  // namespace imu_fast
