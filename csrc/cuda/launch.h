// Launching a kernel on a device and stream, and nothing unnoticed going wrong.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_backend.h"
#include "tuning.h"

namespace clara::cuda {

inline void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here; the runtime must not tell it once more
  throw std::runtime_error(std::string("clara_fused: ") + what + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes a device current for as long as the guard lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice", device);
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

// The one place where kernels are launched. `name` is what an error message calls the kernel; the device is current.
template <typename Kernel, typename Arguments>
void launch(const char* name, Kernel* kernel, int64_t blocks, const Placement& where, const Arguments& arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("clara_fused: too many elements for kernel ") + name);
  const std::string kernel_name = std::string("kernel ") + name;
  void* parameters[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), parameters, 0,
                         static_cast<cudaStream_t>(where.stream)),
        kernel_name.c_str(), where.device);
}

// Enqueues measure or update for the chunks of `arguments`. P: storage of the parameters; each has its own translation
// unit, so that they compile in parallel.
template <typename P, typename Arguments>
void launch_elements(bool measure, DType grad, const Placement& where, const Arguments& arguments);

}  // namespace clara::cuda
