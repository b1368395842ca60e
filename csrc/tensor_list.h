// What one launch works on: a list of parameter tensors that share device and dtypes (a bucket), cut into chunks.
//
// Note [Sampled path]: a large tensor keeps the path of a sample of its elements: in storage order the first `kept` of
// every run of `run` elements, both powers of two. Path element p belongs to element (p / kept) * run + p % kept. A
// tensor with its whole path is the case run = kept.
//
// Note [Chunks]: a chunk is the unit of work of one CUDA block or one CPU task: of a tensor's elements in update, of its
// path elements in measure, where each chunk leaves its sums. Chunk borders depend on nothing but the tensor's size, so
// the norms are bitwise the same for any number of threads, any order of tensors and any placement of blocks. (The back
// ends differ in the size of a chunk, so their norms differ in the last bits.)
#pragma once

#include <cstdint>

#include "adam_clara.h"

namespace clara {

// In the order of SUPPORTED_DTYPES in clara_fused/tensors.py.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

CLARA_HD int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// All pointers are on one device. Parameter, gradient, moments have one common dense layout, so each is a flat array of
// `numel` elements in storage order. Moments and path are float, double for float64 parameters.
struct TensorRecord {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* path;            // path_numel(*this) elements
  float* step;           // 0-dim, steps taken so far
  float* lr_scale;       // 0-dim, mu; the same address for all tensors under Global
  float* walk[kWalkScalars];  // 0-dim, in the order of WalkState
  int64_t numel;              // of this rank's part
  int64_t first_chunk;        // of update, in the list
  int64_t first_path_chunk;   // of measure, in the list
  int64_t group;              // index into the list's GroupOptions
  int32_t run, kept;          // see Note [Sampled path]
};

CLARA_HD int64_t path_numel(const TensorRecord& tensor) { return tensor.numel / tensor.run * tensor.kept; }

CLARA_HD WalkState walk_of(const TensorRecord& tensor) {
  return {*tensor.walk[0], *tensor.walk[1], *tensor.walk[2], *tensor.walk[3],
          *tensor.walk[4], *tensor.walk[5], *tensor.walk[6]};
}

CLARA_HD void set_walk(const TensorRecord& tensor, const WalkState& walk) {
  *tensor.walk[0] = walk.moment_sq;
  *tensor.walk[1] = walk.path_moment;
  *tensor.walk[2] = walk.path_sq;
  *tensor.walk[3] = walk.grad_peak;
  *tensor.walk[4] = walk.cosine;
  *tensor.walk[5] = walk.cosine_sq;
  *tensor.walk[6] = walk.cosine_lag;
}

// The part of adapt before sums over tensors: counts the step, and moves the walk on.
CLARA_HD Evidence advanced(const TensorRecord& tensor, const PathSums& sums, const GroupOptions& options) {
  const double step = static_cast<double>(*tensor.step += 1.0f);
  const WalkState walk = advanced_walk(walk_of(tensor), sums, options, step);
  set_walk(tensor, walk);
  return evidence_of(sums, walk, options);
}

// The part after them.
CLARA_HD void rescale_tensor(const TensorRecord& tensor, const Evidence& evidence, const GroupOptions& options) {
  *tensor.lr_scale = adapted_scale(*tensor.lr_scale, evidence, options);
}

// What the sums over the elements that have a path say of all elements. In the order of PathSums; the squares of the
// weights, which stand for c elements each, times c^2.
CLARA_HD PathSums sums_of_all(const TensorRecord& tensor, const ElementSums<double>& sampled) {
  const double c = static_cast<double>(tensor.run) / static_cast<double>(tensor.kept);
  const double(&sum)[kSums] = sampled.columns;
  return {c * sum[0], c * sum[1], c * sum[2], c * sum[3], c * sum[4],
          c * sum[5], c * sum[6], c * c * sum[7], static_cast<double>(tensor.numel)};
}

struct TensorList {
  const TensorRecord* tensors;
  int64_t count;
  const void* const* grads;  // one per tensor; apart, because they change at every step
  const GroupOptions* groups;
  int64_t group_count;
  int64_t chunk_count, path_chunk_count;
  const float* grad_scale;  // null: gradients are not scaled
  const float* found_inf;   // null or *found_inf == 0: take the step; else change nothing
  DType param_dtype, grad_dtype;
  bool one_scale;  // Global: all tensors share one lr_scale, which follows the sum of their evidence
};

CLARA_HD int64_t chunks_of(int64_t elements, int64_t chunk) { return (elements + chunk - 1) / chunk; }

// Sets what follows from a back end's sizes of chunks, in a list and in its records.
CLARA_HD void number_chunks(TensorList& list, TensorRecord* records, int64_t chunk, int64_t path_chunk) {
  list.chunk_count = list.path_chunk_count = 0;
  for (TensorRecord* tensor = records; tensor != records + list.count; ++tensor) {
    tensor->first_chunk = list.chunk_count;
    tensor->first_path_chunk = list.path_chunk_count;
    list.chunk_count += chunks_of(tensor->numel, chunk);
    list.path_chunk_count += chunks_of(path_numel(*tensor), path_chunk);
  }
}

}  // namespace clara
