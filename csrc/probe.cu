// Compiled and run by setup.py, to find out what the kernels can be built with and for: an nvcc that is there may not
// work with the C++ compiler, and installations from packages can lack any of these headers. Prints the GPUs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>

int main() {
  int count = 0;
  cudaGetDeviceCount(&count);
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp gpu{};
    cudaGetDeviceProperties(&gpu, device);
    std::printf("sm_%d%d\n", gpu.major, gpu.minor);
  }
}
