// The CUDA back end: the same verbs as the CPU's, enqueued on a stream of the caller. Nothing here allocates device
// memory, copies to or from the device, or waits for it, so every function may run while a CUDA graph is captured.
// The caller's current device is restored. A failed CUDA call is a std::runtime_error that names the kernel.
//
// absent.cpp has all of it for builds without CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "../tensor_list.h"

namespace clara::cuda {

// Whether there are kernels for this combination of storage types: float32, bfloat16 or float16 parameters, gradients
// of the same type or float32.
bool supports(DType param, DType grad);

// Why the kernels cannot run on this device, in words for the user (built without CUDA, no driver, an old one, no code
// for the architecture), or nothing if they can. May create the device's context.
std::string device_problem(int device);

// Numbers the chunks of this back end; `records` are the list's.
void number_chunks(TensorList& list, TensorRecord* records);

// Where a list keeps what its kernels need beside the tensors, as offsets into one block of device memory of `bytes`
// bytes, aligned to 256. The first `table_bytes` are written on the host and copied there by the caller, once for as
// long as the records stay as they are; the rest needs no initial value.
struct Layout {
  int64_t tensors;               // TensorRecord [count]
  int64_t tensor_of_chunk;       // int32 [chunks]
  int64_t tensor_of_path_chunk;  // int32 [path_chunks]
  int64_t arrivals;              // uint32: blocks that have finished their part of a total; 0 between steps
  int64_t table_bytes;
  int64_t partial_sums;  // ElementSums<float> [path_chunks]
  int64_t evidence;      // Evidence [count]
  int64_t bytes;
};

// The list's chunks must be numbered, here and below.
Layout layout(const TensorList& list);

// Writes the table into `table_bytes` bytes of host memory, aligned to 8; every byte, so that tables can be compared.
void write_table(const TensorList& list, void* host_memory);

// Whether a table of as many records is the list's; faster than to write it again and compare.
bool is_table_of(const TensorList& list, const void* host_memory);

struct Placement {
  int device;
  void* stream;  // cudaStream_t
  void* memory;  // on the device, see Layout; for one step at a time
};

// In the lists passed to the functions below, `tensors`, `grads` and `groups` are host memory (the records those that
// the table was written from), everything they point to is device memory. If *found_inf != 0 nothing is changed; the
// device decides, and `sums` and `evidence` keep what they held.
//
// The numbers of launches hold for up to 3,000 tensors in 40 groups; see Note [Launch arguments] for more.

// What each of them does is said in cpu_backend.h.
void measure(const TensorList& list, PathSums* sums, const Placement& where);                            // 2 launches
void adapt(const TensorList& list, const PathSums* sums, Evidence* evidence, const Placement& where);    // 1
void update(const TensorList& list, const Placement& where);                                             // 1
void step(const TensorList& list, const Placement& where);                                               // 3

}  // namespace clara::cuda
