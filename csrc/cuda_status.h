// Every CUDA status is checked, and raised with its text, file and line.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace imu_fast {

[[noreturn]] inline void raise(const std::string& what, const char* file, int line) {
  throw std::runtime_error(what + " (" + file + ":" + std::to_string(line) + ")");
}

inline void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  raise(std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status),
        file, line);
}

#define IMU_FAST_CUDA(call) ::imu_fast::check(call, #call, __FILE__, __LINE__)

// Makes `device` the current one, and on leaving the scope the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    IMU_FAST_CUDA(cudaGetDevice(&before_));
    if (device != before_) IMU_FAST_CUDA(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace imu_fast
