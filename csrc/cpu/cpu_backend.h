// The CPU back end: measure, reduce, adapt and apply for a list of tensors, and a whole step in one go.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../tensor_list.h"
#include "workspace.h"

namespace clara {
namespace cpu {

// Elements per chunk; see Note [Chunks]. 64 KiB of float32: many pages per stream, and still fine-grained enough to
// share a tensor of a million elements between threads.
constexpr int64_t kChunk = 16384;

constexpr int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Whether the loops serve this combination of storage types.
bool supports(DType param, DType grad, DType path);

// How the tensors of a list are shared between threads: derived from sizes alone, so it lasts as long as the tensors.
class Schedule {
 public:
  Schedule(const TensorRecord* tensors, int64_t count, int threads);
  // With at most so much memory for Note [Kept directions].
  Schedule(const TensorRecord* tensors, int64_t count, int threads, int64_t max_kept_bytes);

  // A run of chunks of one tensor, or all chunks of several small ones.
  struct Span {
    int64_t first_tensor, last_tensor;  // in the list's order
    int64_t first_chunk, last_chunk;    // within the tensor, when it is only one
  };
  struct Range {
    int64_t first, last;
  };

  int threads() const { return threads_; }
  // All tensors, in the list's order.
  const std::vector<Span>& spans() const { return spans_; }
  // Tensors so large that all threads work on each together, largest first.
  const std::vector<int64_t>& shared_tensors() const { return shared_tensors_; }
  // The others, largest first, and ranges of them that are worth handing to a thread.
  const std::vector<int64_t>& own_tensors() const { return own_tensors_; }
  const std::vector<Range>& tasks() const { return tasks_; }
  // For Note [Kept directions].
  int64_t max_kept_bytes() const { return max_kept_bytes_; }
  Workspace& workspace() const { return *workspace_; }

 private:
  int threads_;
  int64_t max_kept_bytes_;
  std::vector<Span> spans_;
  std::vector<int64_t> shared_tensors_;
  std::vector<int64_t> own_tensors_;
  std::vector<Range> tasks_;
  std::shared_ptr<Workspace> workspace_ = Workspace::of_process();
};

// Every operation does nothing if *list.found_inf != 0. `partial_sums` are of doubles.

// Moments, path and partial sums; under `deferred` also the step, with the scales from before.
void measure(const TensorList& list, const Schedule& schedule);

// partial_sums -> sums.
void reduce(const TensorList& list);

// Counts the step; with `sums` (one per tensor; not under Global) each tensor's scale follows its own.
void adapt(const TensorList& list, const PathSums* sums);

// Takes the step with the scales as they are now; nothing under `deferred`.
void apply(const TensorList& list, const Schedule& schedule);

// All of it, where every tensor of the optimizer (Global) is in this list and none is sharded.
void step(const TensorList& list, const Schedule& schedule);

}  // namespace cpu
}  // namespace clara
