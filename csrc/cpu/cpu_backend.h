// The CPU back end: the verbs for a list of tensors, and a whole step in one go.
#pragma once

#include <cstdint>

#include "../tensor_list.h"

namespace clara::cpu {

// See Note [Chunks]. Of update: 64 KiB of float32, many pages per stream, and still fine-grained enough to share a
// tensor of a million elements between threads. Of measure: a quarter, because a sample is small.
constexpr int64_t kChunk = 16384;
constexpr int64_t kPathChunk = 4096;

// Whether the loops serve this combination of storage types.
bool supports(DType param, DType grad);

// Numbers the chunks of this back end; `records` are the list's.
void number_chunks(TensorList& list, TensorRecord* records);

struct Placement {
  int threads;  // at most
};

// Every verb does nothing if *list.found_inf != 0.

// The path and `sums` [count].
void measure(const TensorList& list, PathSums* sums, const Placement& where);

// Counts the step and moves the walks on, from `sums` [count] to `evidence` [count]; each tensor's scale follows its own,
// but not the one scale of `one_scale`, which follows the evidence of all lists.
void adapt(const TensorList& list, const PathSums* sums, Evidence* evidence, const Placement& where);

// Moments and parameters, with steps and scales as they are now.
void update(const TensorList& list, const Placement& where);

// All of it, where every tensor of the optimizer (`one_scale`) is in this list and none is sharded.
void step(const TensorList& list, const Placement& where);

}  // namespace clara::cpu
