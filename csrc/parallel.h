// A loop over independent items on a few threads: those of the OpenMP library that the caller's
// process uses, if it was told of, else its own. Others' idle OpenMP threads spin for a while after
// each of their loops; threads beside them would wait for a processor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace imu_fast {

// How many pieces of b numbers hold a of them.
inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// GOMP_parallel of libgomp, which LLVM's and Intel's libraries export too: runs work(data) on each
// of `threads` threads, the caller's among them, and returns when all have ended.
using OpenMP = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
inline std::atomic<OpenMP> openmp{nullptr};

namespace detail {

template <typename Work>
void on_own_threads(int threads, const Work& work) {
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; ++t) pool.emplace_back([&] { work(); });
  } catch (...) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  work();
  for (auto& thread : pool) thread.join();
}

}  // namespace detail

// Runs body(i) for i in [0, count), taken one by one by at most `threads` threads; `enter` and
// `leave` run once on each of them. What a body throws ends the loop and is thrown by it.
template <typename Body, typename Enter, typename Leave>
void parallel_for(int64_t count, int threads, const Body& body, const Enter& enter,
                  const Leave& leave) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr thrown;
  std::mutex one;
  const auto work = [&] {
    const auto state = enter();
    try {
      for (int64_t i = next++; i < count; i = next++) body(i);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> held(one);
      if (!thrown) thrown = std::current_exception();
    }
    leave(state);
  };
  using Work = decltype(work);  // const
  if (const OpenMP run = openmp) {
    // As many as the library has already: a smaller team would end the threads beyond it.
    const auto call = [](void* data) { (**static_cast<Work**>(data))(); };
    Work* at = &work;
    run(call, &at, static_cast<unsigned>(threads), 0);
  } else {
    detail::on_own_threads(static_cast<int>(std::min<int64_t>(threads, count)), work);
  }
  if (thrown) std::rethrow_exception(thrown);
}

template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  parallel_for(count, threads, body, [] { return 0; }, [](int) {});
}

}  // namespace imu_fast
