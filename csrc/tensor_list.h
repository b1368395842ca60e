// What one launch works on: a list of parameter tensors that share device and dtypes, cut into chunks.
//
// Note [Chunks]: a tensor of n elements has ceil(n / chunk) chunks; a chunk is the unit of work of one CUDA block or
// one CPU task, and leaves its partial sums. Chunk borders depend on nothing but n, so the norms are bitwise
// the same for any number of threads, any order of tensors and any placement of blocks. (The back ends differ in the
// size of a chunk, so their norms differ in the last bits.)
#pragma once

#include <cstdint>

#include "adam_clara.h"

namespace clara {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

enum class Variant : int32_t { kGlobal = 0, kLocal = 1, kSmoothed = 2 };

// What stays the same from step to step as long as no tensor is replaced. All pointers are on one device; state has
// the parameter's strides, all are dense, so a tensor is a flat array of `numel` elements in storage order.
struct TensorRecord {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* path;
  float* step;      // 0-dim, steps taken so far
  float* lr_scale;  // 0-dim, mu; the same address for all tensors under Global
  int64_t numel;
  int64_t first_chunk;  // index of this tensor's first chunk in the list's partial sums
  int32_t group;        // index into the list's GroupOptions
  int32_t reserved;
};

// What a chunk leaves behind. T: float on CUDA, double on the CPU.
template <typename T>
struct PartialSums {
  T path_sq;
  T step_sq;  // of Adam's steps u; CUDA: only where a reference needs it
};

// The measured quantity that adapt consumes. Sums over ranks (sharding) and over tensors (Global) add both columns.
struct PathSums {
  double path_sq;           // N_i
  double expected_path_sq;  // n_i * kappa_{t_i}, or what a walk of the measured steps gives
};

struct TensorList {
  const TensorRecord* tensors;
  int64_t count;
  const void* const* grads;  // one per tensor: the only pointers that change at every step
  const GroupOptions* groups;
  int64_t group_count;
  int64_t chunk_count;
  void* partial_sums;  // PartialSums, one per chunk
  PathSums* sums;      // one per tensor
  const float* grad_scale;  // null: gradients are not scaled
  const float* found_inf;   // null or *found_inf == 0: take the step; else change nothing
  DType param_dtype, grad_dtype, path_dtype;
  Variant variant;
  int32_t deferred;  // measure also applies, with the scales from before
};

}  // namespace clara
