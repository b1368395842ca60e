// The shape of a block, and sums over its threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tuning.h"

namespace clara::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;

// Combines the columns over all threads of the block, in the same order every time, and gives every thread the results.
// All threads must take part.
template <typename T, int kColumns, typename Combine>
__device__ __forceinline__ void block_reduce(T (&values)[kColumns], Combine combine) {
  __shared__ T of_warp[kColumns][kWarps];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    T& value = values[column];
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_down_sync(0xffffffffu, value, distance));
    }
    if (threadIdx.x % kWarpSize == 0) of_warp[column][threadIdx.x / kWarpSize] = value;
  }
  __syncthreads();
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    values[column] = of_warp[column][0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) values[column] = combine(values[column], of_warp[column][warp]);
  }
  __syncthreads();  // of_warp may be written again
}

}  // namespace clara::cuda
