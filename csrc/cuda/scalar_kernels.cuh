// The kernels that touch a handful of scalars per tensor: reduce (which may adapt at once) and adapt.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "launch_arguments.h"

namespace clara::cuda {

// The total of the evidence, the same for every order of the tensors; see Note [Order-free sums]. A column is not a
// number if one of its values is not finite.
__device__ __forceinline__ Evidence block_total(const Evidence* evidence, int64_t count) {
  static_assert(sizeof(Evidence) == kEvidence * sizeof(double), "a row of numbers");
  // Other blocks have just written the evidence; the L1 cache of this multiprocessor is not told of that.
  const auto value = [&](int64_t tensor, int column) {
    return __ldcg(reinterpret_cast<const double*>(evidence + tensor) + column);
  };
  const auto maximum = [](auto a, auto b) { return a > b ? a : b; };
  double largest[kEvidence] = {};
  int not_finite[kEvidence] = {};
  for (int64_t tensor = threadIdx.x; tensor < count; tensor += kThreads) {
#pragma unroll
    for (int column = 0; column < kEvidence; ++column) {
      const double magnitude = std::fabs(value(tensor, column));
      if (!is_finite(magnitude)) not_finite[column] = 1;
      largest[column] = maximum(magnitude, largest[column]);
    }
  }
  block_reduce(not_finite, maximum);
  block_reduce(largest, maximum);  // last: in the other order ptxas spills a register (sm_120, CUDA 13.0)
  double scale[kEvidence];
#pragma unroll
  for (int column = 0; column < kEvidence; ++column) scale[column] = fixed_point_scale(largest[column], count);

  int64_t totals[kEvidence] = {};
  for (int64_t tensor = threadIdx.x; tensor < count; tensor += kThreads) {
#pragma unroll
    for (int column = 0; column < kEvidence; ++column) {
      if (!not_finite[column]) totals[column] += to_fixed_point(value(tensor, column), scale[column]);
    }
  }
  block_reduce(totals, [](auto a, auto b) { return a + b; });
  double total[kEvidence];
#pragma unroll
  for (int column = 0; column < kEvidence; ++column) {
    total[column] = not_finite[column] ? nan("") : from_fixed_point(totals[column], scale[column]);
  }
  return {total[0], total[1], total[2], total[3], total[4], total[5], total[6], total[7]};
}

// Whether this block is the last of `count` to come here, and so sees what all others wrote before they did. The next
// kernel finds the counter at 0 again.
__device__ __forceinline__ bool last_to_arrive(uint32_t* arrivals, int64_t count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrivals, 1u) == static_cast<uint32_t>(count - 1);
    if (last) *arrivals = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// One block per tensor: partial sums -> sums, and what is to come after. No float atomics: the order of additions is
// fixed.
template <typename Arguments>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Arguments __grid_constant__ arguments) {
  if (arguments.skipped()) return;
  const int64_t tensor = arguments.first_tensor + blockIdx.x;
  const TensorRecord& record = arguments.tensors[tensor];
  const GroupOptions& options = arguments.group(record);

  const ElementSums<float>* partial_sums = arguments.partial_sums + record.first_path_chunk;
  const int64_t path_chunks = chunks_of(path_numel(record), kPathChunk);
  ElementSums<double> total{};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < path_chunks; i += kThreads) add(total, partial_sums[i]);
  block_reduce(total.columns, [](auto a, auto b) { return a + b; });

  if (threadIdx.x == 0) {
    const PathSums sums = sums_of_all(record, total);
    if (arguments.after == After::kNothing) {
      arguments.sums[tensor] = sums;
    } else {
      const Evidence evidence = advanced(record, sums, options);
      if (arguments.after == After::kRescaleOwn) rescale_tensor(record, evidence, options);
      if (arguments.after == After::kRescaleAll) arguments.evidence[tensor] = evidence;
    }
  }

  if (arguments.after != After::kRescaleAll || !last_to_arrive(arguments.arrivals, arguments.list_count)) return;
  const Evidence of_all = block_total(arguments.evidence, arguments.list_count);
  // All tensors share the scale, and all groups the options that matter here.
  if (threadIdx.x == 0) rescale_tensor(record, of_all, options);
}

// One thread per tensor: adapt, with sums that were completed elsewhere.
template <typename Arguments>
__global__ void __launch_bounds__(kThreads) adapt_kernel(const Arguments __grid_constant__ arguments) {
  if (arguments.skipped()) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= arguments.count) return;
  const int64_t tensor = arguments.first_tensor + i;
  const TensorRecord& record = arguments.tensors[tensor];
  const GroupOptions& options = arguments.group(record);
  const Evidence evidence = advanced(record, arguments.sums[tensor], options);
  if (arguments.after == After::kRescaleOwn) rescale_tensor(record, evidence, options);
  arguments.evidence[tensor] = evidence;
}

}  // namespace clara::cuda
