// The kernels that touch a handful of scalars per tensor: reduce (with or without adapt), adapt.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "cuda_backend.h"
#include "launch_arguments.h"

namespace clara {
namespace cuda {

__device__ __forceinline__ void adapt_scale(const TensorRecord& record, double path_sq, double expected_path_sq,
                                            const GroupOptions& options) {
  *record.lr_scale = adapted_scale(*record.lr_scale, path_sq, expected_path_sq, options);
}

// The total of one column of the sums, the same for every order of the tensors; see Note [Order-free sums]. Not a
// number if one of them is not finite.
__device__ __forceinline__ double block_total(const PathSums* sums, int64_t count, double PathSums::*column) {
  // Other blocks have just written the sums; the L1 cache of this multiprocessor is not told of that.
  const auto value = [&](int64_t i) { return __ldcg(&(sums[i].*column)); };
  constexpr double kMaxFinite = 1.7976931348623157e308;
  double largest = 0.0;
  bool finite = true;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    finite = finite && value(i) <= kMaxFinite;
    largest = Maximum{}(largest, value(i));
  }
  const bool all_finite = block_reduce(finite ? 0 : 1, Sum{}) == 0;
  const double scale = fixed_point_scale(block_reduce(largest, Maximum{}), count);
  int64_t total = 0;
  if (all_finite) {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) total += to_fixed_point(value(i), scale);
  }
  total = block_reduce(total, Sum{});
  return all_finite ? from_fixed_point(total, scale) : kMaxFinite * 0.0 / 0.0;
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

  const PartialSums<float>* partial_sums = arguments.partial_sums + record.first_chunk;
  const int64_t chunk_count = chunks_of(record.numel);
  PartialSums<double> total = {0.0, 0.0};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < chunk_count; i += kThreads) {
    total.path_sq += static_cast<double>(partial_sums[i].path_sq);
    total.step_sq += static_cast<double>(partial_sums[i].step_sq);
  }
  total.path_sq = block_reduce(total.path_sq, Sum{});
  if (options.walk_unit == WalkUnit::kStepSquared) total.step_sq = block_reduce(total.step_sq, Sum{});

  if (threadIdx.x == 0) {
    const int64_t step = step_after(*record.step);
    const PathSums sums = {total.path_sq, expected_path_sq(options, step, record.numel, total.step_sq)};
    arguments.sums[tensor] = sums;
    if (arguments.after == After::kAdaptOwn) adapt_scale(record, sums.path_sq, sums.expected_path_sq, options);
    if (arguments.after != After::kNothing) *record.step += 1.0f;
  }

  if (arguments.after != After::kAdaptAll || !last_to_arrive(arguments.arrivals, arguments.list_count)) return;
  const double path_sq = block_total(arguments.sums, arguments.list_count, &PathSums::path_sq);
  const double expected = block_total(arguments.sums, arguments.list_count, &PathSums::expected_path_sq);
  // All tensors share the scale, and all groups the options that matter here.
  if (threadIdx.x == 0) adapt_scale(record, path_sq, expected, options);
}

// One thread per tensor: counts the step and adapts to sums that were completed elsewhere (over ranks).
template <typename Arguments>
__global__ void __launch_bounds__(kThreads) adapt_kernel(const Arguments __grid_constant__ arguments) {
  if (arguments.skipped()) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= arguments.count) return;
  const int64_t tensor = arguments.first_tensor + i;
  const TensorRecord& record = arguments.tensors[tensor];
  if (arguments.adapts) {
    const PathSums& sums = arguments.sums[tensor];
    adapt_scale(record, sums.path_sq, sums.expected_path_sq, arguments.group(record));
  }
  *record.step += 1.0f;
}

}  // namespace cuda
}  // namespace clara
