// csrc/cholesky_block.h on the CPU, a thread for each lane: what __syncthreads orders on the GPU a
// barrier orders here, and ThreadSanitizer reports what neither does.
//
//   cholesky_block_lanes f32|f64 N COLUMNS LANES DAMPING < A [N, N], B [COLUMNS, N] > U, X, status
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cholesky_block.h"

namespace {

class Lane {
 public:
  Lane(int lane, int size, std::barrier<>& block, std::barrier<>& warp)
      : lane_(lane), size_(size), block_(block), warp_(warp) {}
  int lane() const { return lane_; }
  int size() const { return size_; }
  void sync() const { block_.arrive_and_wait(); }
  void sync_warp() const { warp_.arrive_and_wait(); }

 private:
  int lane_, size_;
  std::barrier<>&block_, &warp_;
};

template <typename Body>
void run(int lanes, const Body& body) {
  std::barrier<> block(lanes);
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  for (int w = 0; w < lanes / imu_fast::kWarp; ++w)
    warps.push_back(std::make_unique<std::barrier<>>(imu_fast::kWarp));
  std::vector<std::thread> threads;
  for (int i = 0; i < lanes; ++i)
    threads.emplace_back([&, i] { body(Lane(i, lanes, block, *warps[i / imu_fast::kWarp])); });
  for (auto& thread : threads) thread.join();
}

// Exactly as much as the kernels are given, full of NaN: reading what was not written shows.
template <typename T>
struct Shared {
  explicit Shared(int64_t elements)
      : size(elements), data(new (std::align_val_t{16}) T[elements]) {
    std::memset(data, 0xff, elements * sizeof(T));
  }
  ~Shared() { operator delete[](data, std::align_val_t{16}); }
  int64_t size;
  T* data;
};

template <typename T>
int main_of(int n, int columns, int lanes, T damping) {
  std::vector<T> a(n * n), u(n * n), b(n * columns);
  if (std::fread(a.data(), sizeof(T), a.size(), stdin) != a.size()) return 2;
  if (std::fread(b.data(), sizeof(T), b.size(), stdin) != b.size()) return 2;
  int status = -1;
  Shared<T> for_factor(imu_fast::factor_elements<T>(n));
  run(lanes, [&](const Lane& lane) {
    imu_fast::factor_block(lane, a.data(), u.data(), n, damping, &status, for_factor.data);
  });
  for (int first = 0; first < columns; first += imu_fast::kColumns) {
    const int count = std::min(columns - first, imu_fast::kColumns);
    Shared<T> for_solve(imu_fast::solve_elements<T>(n, count));
    run(lanes, [&](const Lane& lane) {
      imu_fast::solve_block(lane, u.data(), n, b.data() + first * n, count, for_solve.data);
    });
  }
  std::fwrite(u.data(), sizeof(T), u.size(), stdout);
  std::fwrite(b.data(), sizeof(T), b.size(), stdout);
  std::fwrite(&status, sizeof(status), 1, stdout);
  return 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 6) return 2;
  const int n = std::atoi(argument[2]), columns = std::atoi(argument[3]);
  const int lanes = std::atoi(argument[4]);
  const double damping = std::atof(argument[5]);
  if (std::strcmp(argument[1], "f32") == 0) return main_of<float>(n, columns, lanes, damping);
  return main_of<double>(n, columns, lanes, damping);
}
