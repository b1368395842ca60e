// The CUDA back end: the same verbs as the CPU's, enqueued on a stream of the caller. Nothing here allocates device
// memory, copies to or from the device, or waits for it, so every function may run while a CUDA graph is captured.
// The caller's current device is restored. A failed CUDA call is a std::runtime_error that names the kernel.
#pragma once

#include <cstdint>
#include <string>

#include "../tensor_list.h"

namespace clara {
namespace cuda {

// Elements per chunk; see Note [Chunks]. Small enough that a model of a few million elements fills the device, large
// enough that a block spends its time on elements rather than on looking up its tensor.
constexpr int64_t kChunk = 8192;

CLARA_HD constexpr int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Whether there are kernels for this combination of storage types: float32, bfloat16 or float16 parameters, gradients
// of the same type or float32, path float32 or bfloat16.
bool supports(DType param, DType grad, DType path);

// Why the kernels cannot run on this device, in words for the user (no driver, an old one, no code for the
// architecture), or nothing if they can. May create the device's context.
std::string device_problem(int device);

// Where a list keeps what its kernels need beside the tensors, as offsets into one block of device memory of `bytes`
// bytes, aligned to 256. The first `table_bytes` are written on the host and copied there by the caller, once for as
// long as the records stay as they are; the rest needs no initial value.
struct Layout {
  int64_t tensors;          // TensorRecord [count]
  int64_t tensor_of_chunk;  // int32 [chunk_count]
  int64_t arrivals;         // uint32: blocks that have finished their part of a total; 0 between steps
  int64_t table_bytes;
  int64_t partial_sums;  // PartialSums<float> [chunk_count]
  int64_t sums;          // PathSums [count]
  int64_t bytes;
};

Layout layout(int64_t count, int64_t chunk_count);

// Writes the table into `table_bytes` bytes of host memory, aligned to 8. `first_chunk` of the records must be set
// (chunks of this back end).
void write_table(const TensorRecord* tensors, int64_t count, void* host_memory);

struct Placement {
  int device;
  void* stream;  // cudaStream_t
  void* memory;  // on the device, see Layout; for one step at a time
};

// In the lists passed to the functions below, `tensors`, `grads` and `groups` are host memory (the records those that
// the table was written from), everything they point to is device memory; `partial_sums` is not used.
// If *found_inf != 0 nothing is changed; the device decides.

// Moments, path and list.sums (device memory); under `deferred` also the step, with the scales from before. 2 launches.
void measure(const TensorList& list, const Placement& where);

// Counts the step; with `sums` (device memory, one per tensor; not under Global) each tensor's scale follows its own.
// 1 launch.
void adapt(const TensorList& list, const PathSums* sums, const Placement& where);

// Takes the step with the scales as they are now; nothing under `deferred`. 1 launch.
void apply(const TensorList& list, const Placement& where);

// All of it, where every tensor of the optimizer (Global) is in this list and none is sharded. 3 launches, 2 under
// `deferred`; list.sums is not used.
//
// The counts hold for up to 3,000 tensors in 40 groups; see Note [Launch arguments] for more.
void step(const TensorList& list, const Placement& where);

}  // namespace cuda
}  // namespace clara
