// What a kernel gets to know: everything that may change from step to step.
//
// Note [Launch arguments]: kernel parameters may take 32,764 bytes (since CUDA 12.1, from sm_70 on). That holds the
// gradients' addresses of thousands of tensors and the options of their groups, so a step needs no copy to the device,
// and nothing that a copy would have to wait for. What stays the same between steps is a table in device memory. A
// list with more tensors or groups than the space holds is cut into runs of tensors, one launch each. Most lists fit
// into 4 KiB, and the scalar kernels need no gradients: these do not pay for moving 32 KiB.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../tensor_list.h"

namespace clara::cuda {

// What becomes of the sums once they are reduced.
enum class After : int32_t {
  kNothing,     // whoever asked for them goes on
  kRescaleOwn,  // the step is counted, and each tensor's scale follows its own evidence
  kRescaleAll,  // the step is counted, and the one scale follows the total of the evidence
};

template <int kBytes>
struct LaunchArguments {
  // The device table of the whole list; see Layout.
  const TensorRecord* tensors;
  const int32_t* tensor_of_chunk;  // of the kernel's kind of chunks, as are the chunks below
  uint32_t* arrivals;
  int64_t list_count;
  ElementSums<float>* partial_sums;
  PathSums* sums;
  Evidence* evidence;

  const float* grad_scale;
  const float* found_inf;

  // This launch's part of the list.
  int64_t first_tensor, count;
  int64_t first_chunk, chunk_count;
  int64_t first_group;
  int32_t groups_offset;
  After after;

  static constexpr int kPayloadBytes = kBytes - 120;
  alignas(8) unsigned char payload[kPayloadBytes];  // gradients [count], if the kernel needs any; groups

  __device__ __forceinline__ const void* grad(int64_t tensor) const {
    return reinterpret_cast<const void* const*>(payload)[tensor - first_tensor];
  }
  __device__ __forceinline__ const GroupOptions& group(const TensorRecord& tensor) const {
    return reinterpret_cast<const GroupOptions*>(payload + groups_offset)[tensor.group - first_group];
  }
  __device__ __forceinline__ bool skipped() const { return found_inf != nullptr && *found_inf != 0.0f; }
};

using SmallArguments = LaunchArguments<4096>;
using LargeArguments = LaunchArguments<32760>;
static_assert(sizeof(SmallArguments) == 4096 && sizeof(LargeArguments) == 32760,
              "the payload takes what the limit on kernel parameters leaves");

}  // namespace clara::cuda
