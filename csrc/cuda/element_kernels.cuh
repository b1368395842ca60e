// The kernels that touch every element: measure, measure-and-apply, apply. One block works on one chunk.
//
// They only move data; what they compute is in adam_clara.h. Bytes are the budget: all loads of a vector are issued
// before the first is used, and the sum of path^2 comes from registers.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "cuda_backend.h"
#include "launch_arguments.h"
#include "storage.cuh"

namespace clara {
namespace cuda {

static_assert(kChunk % (kThreads * kVector) == 0, "a full chunk keeps all threads busy to its end");

// The part of one tensor that a block works on.
struct ChunkOfTensor {
  int64_t tensor;  // in the list
  TensorRecord record;  // a copy: all of it is on its way before any of it is needed
  int64_t first_element;
  int count;
};

template <typename Arguments>
__device__ __forceinline__ ChunkOfTensor locate(const Arguments& arguments, int64_t chunk) {
  const int64_t tensor = arguments.tensor_of_chunk[chunk];
  const TensorRecord record = arguments.tensors[tensor];
  const int64_t first = (chunk - record.first_chunk) * kChunk;
  const int64_t left = record.numel - first;
  return {tensor, record, first, static_cast<int>(left < kChunk ? left : kChunk)};
}

template <Access kAccess>
struct AccessTag {
  static constexpr Access kValue = kAccess;
};

// Calls visit(tag of access, first) for the runs of four elements that are this thread's, and for single ones at the end
// of a tensor. However they are reached, an element belongs to the same thread, which comes to it in the same turn: sums
// do not depend on alignment.
template <typename Visit>
__device__ __forceinline__ void for_each_vector(int count, bool all_aligned, Visit visit) {
  constexpr int kStride = kThreads * kVector;
  int first = static_cast<int>(threadIdx.x) * kVector;
  if (all_aligned) {
    for (; first + kVector <= count; first += kStride) visit(AccessTag<Access::kAligned>{}, first);
  } else {
    for (; first + kVector <= count; first += kStride) visit(AccessTag<Access::kMixed>{}, first);
  }
#pragma unroll 1
  for (; first < count; ++first) visit(AccessTag<Access::kSingle>{}, first);
}

// ---------------------------------------------------------------------------------------------------------------
// Measure
// ---------------------------------------------------------------------------------------------------------------

// P, G, S: storage of parameters, gradients and path.
template <typename P, typename G, typename S>
struct MeasureStreams {
  Stream<P> param;
  Stream<G> grad;
  Stream<float> exp_avg, exp_avg_sq, max_exp_avg_sq;
  Stream<S> path;

  __device__ __forceinline__ bool all_aligned() const {
    return param.aligned() && grad.aligned() && exp_avg.aligned() && exp_avg_sq.aligned() &&
           max_exp_avg_sq.aligned() && path.aligned();
  }
};

struct MeasureAndApplyCoefficients {
  MeasureCoefficients<float> measure;
  ApplyCoefficients<float> apply;  // with the scale from before; only where measure also applies
};

// Adds the elements' squares to `sums`.
template <bool kApply, Access kAccess, typename P, typename G, typename S>
__device__ __forceinline__ void measure_vector(const MeasureStreams<P, G, S>& streams,
                                               const MeasureAndApplyCoefficients& with, int first,
                                               PartialSums<float>& sums) {
  const MeasureCoefficients<float>& c = with.measure;
  const bool amsgrad = streams.max_exp_avg_sq.exists();
  const Vector<G, kElements<kAccess>> grad = streams.grad.template load<kAccess>(first);
  Vector<float, kElements<kAccess>> m = streams.exp_avg.template load<kAccess>(first);
  Vector<float, kElements<kAccess>> v = streams.exp_avg_sq.template load<kAccess>(first);
  Vector<S, kElements<kAccess>> path = streams.path.template load<kAccess>(first);
  Vector<P, kElements<kAccess>> param = {};
  if (kApply || c.coupled_decay != 0.0f) param = streams.param.template load<kAccess>(first);
  Vector<float, kElements<kAccess>> max_v = {};
  if (amsgrad) max_v = streams.max_exp_avg_sq.template load<kAccess>(first);

#pragma unroll
  for (int i = 0; i < kElements<kAccess>; ++i) {
    const float theta = to_float(param.element[i]);
    const float g = effective_gradient(to_float(grad.element[i]), theta, c);
    m.element[i] = first_moment(m.element[i], g, c);
    v.element[i] = second_moment(v.element[i], g, c);
    max_v.element[i] = amsgrad ? running_maximum(max_v.element[i], v.element[i]) : v.element[i];
    const float u = adam_direction(m.element[i], max_v.element[i], c.direction);
    path.element[i] = from_float<S>(extended_path(to_float(path.element[i]), u, c));
    const float stored = to_float(path.element[i]);
    sums.path_sq += stored * stored;
    sums.step_sq += u * u;
    if (kApply) param.element[i] = from_float<P>(updated_parameter(theta, u, with.apply));
  }

  streams.exp_avg.template store<kAccess>(first, m);
  streams.exp_avg_sq.template store<kAccess>(first, v);
  streams.path.template store<kAccess>(first, path);
  if (amsgrad) streams.max_exp_avg_sq.template store<kAccess>(first, max_v);
  if (kApply) streams.param.template store<kAccess>(first, param);
}

template <bool kApply, typename P, typename G, typename S, typename Arguments>
__global__ void __launch_bounds__(kThreads) measure_kernel(const Arguments __grid_constant__ arguments) {
  if (arguments.skipped()) return;
  const int64_t chunk_index = arguments.first_chunk + blockIdx.x;
  const ChunkOfTensor chunk = locate(arguments, chunk_index);
  const TensorRecord& record = chunk.record;

  __shared__ MeasureAndApplyCoefficients with;
  __shared__ WalkUnit walk_unit;  // not in a register, of which the loop needs all
  if (threadIdx.x == 0) {
    const GroupOptions& options = arguments.group(record);
    walk_unit = options.walk_unit;
    const float step = *record.step + 1.0f;
    with.measure = measure_coefficients<float>(options, step, arguments.grad_scale);
    if (kApply) with.apply = apply_coefficients<float>(options, step, *record.lr_scale);
  }
  __syncthreads();

  const int64_t first = chunk.first_element;
  const MeasureStreams<P, G, S> streams = {stream_at<P>(record.param, first),
                                           stream_at<G>(arguments.grad(chunk.tensor), first),
                                           stream_at<float>(record.exp_avg, first),
                                           stream_at<float>(record.exp_avg_sq, first),
                                           stream_at<float>(record.max_exp_avg_sq, first),
                                           stream_at<S>(record.path, first)};
  PartialSums<float> sums = {0.0f, 0.0f};
  for_each_vector(chunk.count, streams.all_aligned(), [&](auto access, int i) {
    measure_vector<kApply, access.kValue>(streams, with, i, sums);
  });

  sums.path_sq = block_reduce(sums.path_sq, Sum{});
  if (walk_unit == WalkUnit::kStepSquared) sums.step_sq = block_reduce(sums.step_sq, Sum{});
  if (threadIdx.x == 0) arguments.partial_sums[chunk_index] = sums;
}

// ---------------------------------------------------------------------------------------------------------------
// Apply
// ---------------------------------------------------------------------------------------------------------------

template <typename P>
struct ApplyStreams {
  Stream<P> param;
  Stream<float> exp_avg;
  Stream<float> exp_avg_sq;  // the running maximum under amsgrad

  __device__ __forceinline__ bool all_aligned() const {
    return param.aligned() && exp_avg.aligned() && exp_avg_sq.aligned();
  }
};

template <Access kAccess, typename P>
__device__ __forceinline__ void apply_vector(const ApplyStreams<P>& streams, const ApplyCoefficients<float>& c,
                                             int first) {
  const Vector<float, kElements<kAccess>> m = streams.exp_avg.template load<kAccess>(first);
  const Vector<float, kElements<kAccess>> v = streams.exp_avg_sq.template load<kAccess>(first);
  Vector<P, kElements<kAccess>> param = streams.param.template load<kAccess>(first);
#pragma unroll
  for (int i = 0; i < kElements<kAccess>; ++i) {
    const float u = adam_direction(m.element[i], v.element[i], c.direction);
    param.element[i] = from_float<P>(updated_parameter(to_float(param.element[i]), u, c));
  }
  streams.param.template store<kAccess>(first, param);
}

// Walks the chunks from the last to the first: what measure touched last is still in the L2 cache.
template <typename P, typename Arguments>
__global__ void __launch_bounds__(kThreads) apply_kernel(const Arguments __grid_constant__ arguments) {
  if (arguments.skipped()) return;
  const ChunkOfTensor chunk = locate(arguments, arguments.first_chunk + arguments.chunk_count - 1 - blockIdx.x);
  const TensorRecord& record = chunk.record;

  __shared__ ApplyCoefficients<float> with;
  if (threadIdx.x == 0) {
    with = apply_coefficients<float>(arguments.group(record), *record.step, *record.lr_scale);
  }
  __syncthreads();

  const int64_t first = chunk.first_element;
  const ApplyStreams<P> streams = {
      stream_at<P>(record.param, first), stream_at<float>(record.exp_avg, first),
      stream_at<float>(record.max_exp_avg_sq != nullptr ? record.max_exp_avg_sq : record.exp_avg_sq, first)};
  for_each_vector(chunk.count, streams.all_aligned(),
                  [&](auto access, int i) { apply_vector<access.kValue>(streams, with, i); });
}

}  // namespace cuda
}  // namespace clara
