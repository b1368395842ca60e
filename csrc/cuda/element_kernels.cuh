// The kernels that touch elements: measure and update. One block works on one chunk.
//
// They only move data; what they compute is in adam_clara.h. Bytes are the budget: all loads of a thread's vector are
// issued before the first is used, and the sums come from registers.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "launch.h"
#include "launch_arguments.h"
#include "storage.cuh"

namespace clara::cuda {

static_assert(kChunk % (kThreads * kVector) == 0 && kPathChunk % (kThreads * kVector) == 0,
              "a full chunk keeps all threads busy to its end");

__device__ __forceinline__ int count_in_chunk(int64_t numel, int64_t first, int64_t chunk) {
  const int64_t left = numel - first;
  return static_cast<int>(left < chunk ? left : chunk);
}

// What a thread does in one turn.
template <Access kAccessOfTurn>
struct Turn {
  static constexpr Access kAccess = kAccessOfTurn;
  static constexpr int kCount = kElements<kAccess>;
};

// Calls visit(turn, first) for the runs of four elements that are this thread's, and for single ones at the end of a
// tensor. However they are reached, an element belongs to the same thread, which comes to it in the same order: sums do
// not depend on alignment.
template <typename Visit>
__device__ __forceinline__ void for_each_vector(int count, bool all_aligned, Visit visit) {
  constexpr int kStride = kThreads * kVector;
  int first = static_cast<int>(threadIdx.x) * kVector;
  if (all_aligned) {
#pragma unroll 1
    for (; first + kVector <= count; first += kStride) visit(Turn<Access::kAligned>{}, first);
  } else {
#pragma unroll 1
    for (; first + kVector <= count; first += kStride) visit(Turn<Access::kMixed>{}, first);
  }
#pragma unroll 1
  for (; first < count; ++first) visit(Turn<Access::kSingle>{}, first);
}

// Note [Registers]: addresses and coefficients lie in shared memory, and every turn reads them anew (measure, which has
// its sums to keep as well, for every element), so that the registers are free for the elements that are on their way.
// Otherwise the compiler reads them once, keeps them, and spills.
__device__ __forceinline__ void read_shared_memory_again() { asm volatile("" ::: "memory"); }

// P, G: storage of parameters and gradients.
template <typename P, typename G>
struct Streams {
  Stream<P> param;
  Stream<G> grad;
  Stream<float> exp_avg, exp_avg_sq, max_exp_avg_sq;

  __device__ __forceinline__ bool all_aligned() const {
    return param.aligned() && grad.aligned() && exp_avg.aligned() && exp_avg_sq.aligned() && max_exp_avg_sq.aligned();
  }
};

template <typename P, typename G>
__device__ __forceinline__ Streams<P, G> streams_of(const TensorRecord& record, const void* grad, int64_t first) {
  return {stream_at<P>(record.param, first), stream_at<G>(grad, first),
          stream_at<float>(record.exp_avg, first), stream_at<float>(record.exp_avg_sq, first),
          stream_at<float>(record.max_exp_avg_sq, first)};
}

// Four neighbouring elements (or one) of all streams but the path.
template <typename P, typename G, int kCount>
struct Elements {
  Vector<G, kCount> grad;
  Vector<float, kCount> m, v, max_v;
  Vector<P, kCount> param;
};

template <Access kAccess, typename P, typename G>
__device__ __forceinline__ Elements<P, G, kElements<kAccess>> load(const Streams<P, G>& streams, int at,
                                                                   bool with_param) {
  Elements<P, G, kElements<kAccess>> e;
  e.grad = streams.grad.template load<kAccess>(at);
  e.m = streams.exp_avg.template load<kAccess>(at);
  e.v = streams.exp_avg_sq.template load<kAccess>(at);
  e.max_v = {};
  if (streams.max_exp_avg_sq.exists()) e.max_v = streams.max_exp_avg_sq.template load<kAccess>(at);
  e.param = {};
  if (with_param) e.param = streams.param.template load<kAccess>(at);
  return e;
}

// Brings the moments of one element up to date, and returns its effective gradient and d.
struct Direction {
  float grad, d;
};

template <typename P, typename G, int kCount>
__device__ __forceinline__ Direction advance_moments(Elements<P, G, kCount>& e, int i, bool amsgrad,
                                                     const AdamCoefficients<float>& c) {
  const float grad = effective_gradient(to_float(e.grad.element[i]), to_float(e.param.element[i]), c);
  e.m.element[i] = first_moment(e.m.element[i], grad, c);
  e.v.element[i] = second_moment(e.v.element[i], grad, c);
  e.max_v.element[i] = amsgrad ? running_maximum(e.max_v.element[i], e.v.element[i]) : e.v.element[i];
  return {grad, denominator(e.max_v.element[i], c)};
}

// ---------------------------------------------------------------------------------------------------------------
// Measure
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int log2_of(int power_of_two) { return __ffs(power_of_two) - 1; }

// Where the elements of a sample lie; see Note [Sampled path].
struct Sample {
  int log_run, log_kept;

  __device__ __forceinline__ bool whole() const { return log_run == log_kept; }
  __device__ __forceinline__ int64_t path_numel(int64_t numel) const { return numel >> log_run << log_kept; }
  // Of the chunk that starts with this path element: a full number of runs.
  __device__ __forceinline__ int64_t first_element(int64_t path_element) const {
    return path_element >> log_kept << log_run;
  }
  // Within a chunk.
  __device__ __forceinline__ int element(int path_element) const {
    return path_element + (path_element >> log_kept) * ((1 << log_run) - (1 << log_kept));
  }
  // Four neighbours in the path are four neighbours in the tensor.
  __device__ __forceinline__ bool in_vectors() const { return whole() || log_kept >= 2; }
};

static_assert(kVector == 4, "log_kept >= 2 says that a vector lies within a run");
static_assert(kPathChunk % 1024 == 0, "a chunk holds whole runs, whose longest are 1024");

template <typename Turn, typename P, typename G>
__device__ __forceinline__ void measure_vector(const Streams<P, G>& streams, const Stream<float>& paths,
                                               const Sample& sample, const MeasureCoefficients<float>& c, int at,
                                               ElementSums<float>& sums) {
  const bool amsgrad = streams.max_exp_avg_sq.exists();
  read_shared_memory_again();
  auto e = load<Turn::kAccess>(streams, sample.element(at), c.adam.coupled_decay != 0.0f);
  auto path = paths.load<Turn::kAccess>(at);
#pragma unroll
  for (int i = 0; i < Turn::kCount; ++i) {
    read_shared_memory_again();
    const float before = path.element[i], m_before = e.m.element[i];
    const float d_before = denominator(amsgrad ? e.max_v.element[i] : e.v.element[i], c.adam);
    const Direction to = advance_moments(e, i, amsgrad, c.adam);
    const float u = adam_step(e.m.element[i], to.d, c.adam);
    if (c.moves) path.element[i] = extended_path(before, u, c);
    add(sums, element_sums(before, path.element[i], m_before, e.m.element[i], to.grad, d_before, to.d, c));
  }
  if (c.moves) paths.store<Turn::kAccess>(at, path);
}

// Walks the chunks from the last to the first: update begins with what measure has just read, as far as the L2 cache
// still holds it.
template <typename P, typename G, typename Arguments>
__global__ void __launch_bounds__(kThreads, kMeasureBlocks) measure_kernel(const Arguments __grid_constant__ arguments) {
  if (arguments.skipped()) return;
  const int64_t chunk = arguments.first_chunk + arguments.chunk_count - 1 - blockIdx.x;
  const int64_t tensor = arguments.tensor_of_chunk[chunk];
  const TensorRecord record = arguments.tensors[tensor];  // a copy: all is on its way before any of it is needed

  const Sample sample = {log2_of(record.run), log2_of(record.kept)};
  const int64_t first = (chunk - record.first_path_chunk) * kPathChunk;
  const int count = count_in_chunk(sample.path_numel(record.numel), first, kPathChunk);
  __shared__ MeasureCoefficients<float> with;
  __shared__ Streams<P, G> streams;
  __shared__ Stream<float> path;
  if (threadIdx.x == 0) {
    streams = streams_of<P, G>(record, arguments.grad(tensor), sample.first_element(first));
    path = stream_at<float>(record.path, first);
    with = measure_coefficients<float>(arguments.group(record), *record.step + 1.0f, arguments.grad_scale,
                                       walk_of(record).moment_sq);
  }
  __syncthreads();

  ElementSums<float> sums{};
  if (sample.in_vectors()) {
    for_each_vector(count, streams.all_aligned() && path.aligned(), [&](auto turn, int i) {
      measure_vector<decltype(turn)>(streams, path, sample, with, i, sums);
    });
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      measure_vector<Turn<Access::kSingle>>(streams, path, sample, with, i, sums);
    }
  }

  block_reduce(sums.columns, [](auto a, auto b) { return a + b; });
  if (threadIdx.x == 0) arguments.partial_sums[chunk] = sums;
}

// ---------------------------------------------------------------------------------------------------------------
// Update
// ---------------------------------------------------------------------------------------------------------------

template <typename Turn, typename P, typename G>
__device__ __forceinline__ void update_vector(const Streams<P, G>& streams, const UpdateCoefficients<float>& c, int at) {
  const bool amsgrad = streams.max_exp_avg_sq.exists();
  read_shared_memory_again();
  auto e = load<Turn::kAccess>(streams, at, true);
#pragma unroll
  for (int i = 0; i < Turn::kCount; ++i) {
    const Direction to = advance_moments(e, i, amsgrad, c.adam);
    const float u = adam_step(e.m.element[i], to.d, c.adam);
    e.param.element[i] = from_float<P>(updated_parameter(to_float(e.param.element[i]), u, c));
  }
  streams.exp_avg.template store<Turn::kAccess>(at, e.m);
  streams.exp_avg_sq.template store<Turn::kAccess>(at, e.v);
  if (amsgrad) streams.max_exp_avg_sq.template store<Turn::kAccess>(at, e.max_v);
  streams.param.template store<Turn::kAccess>(at, e.param);
}

template <typename P, typename G, typename Arguments>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks) update_kernel(const Arguments __grid_constant__ arguments) {
  if (arguments.skipped()) return;
  const int64_t chunk = arguments.first_chunk + blockIdx.x;
  const int64_t tensor = arguments.tensor_of_chunk[chunk];
  const TensorRecord record = arguments.tensors[tensor];  // a copy, as in measure

  const int64_t first = (chunk - record.first_chunk) * kChunk;
  __shared__ UpdateCoefficients<float> with;
  __shared__ Streams<P, G> streams;
  if (threadIdx.x == 0) {
    streams = streams_of<P, G>(record, arguments.grad(tensor), first);
    with = update_coefficients<float>(arguments.group(record), *record.step, arguments.grad_scale, *record.lr_scale);
  }
  __syncthreads();

  for_each_vector(count_in_chunk(record.numel, first, kChunk), streams.all_aligned(),
                  [&](auto turn, int i) { update_vector<decltype(turn)>(streams, with, i); });
}

// ---------------------------------------------------------------------------------------------------------------
// From dtype codes to instances of the kernels
// ---------------------------------------------------------------------------------------------------------------

template <typename P, typename Arguments>
void launch_elements(bool measure, DType grad, const Placement& where, const Arguments& arguments) {
  const bool wide = grad == DType::kFloat32;
  const auto measuring = wide ? measure_kernel<P, float, Arguments> : measure_kernel<P, P, Arguments>;
  const auto updating = wide ? update_kernel<P, float, Arguments> : update_kernel<P, P, Arguments>;
  launch(measure ? "measure" : "update", measure ? measuring : updating, arguments.chunk_count, where, arguments);
}

#define CLARA_INSTANTIATE_ELEMENT_KERNELS(P)                                              \
  template void launch_elements<P>(bool, DType, const Placement&, const SmallArguments&); \
  template void launch_elements<P>(bool, DType, const Placement&, const LargeArguments&)

}  // namespace clara::cuda
