#include "cuda_backend.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "launch.h"
#include "launch_arguments.h"
#include "scalar_kernels.cuh"
#include "storage.cuh"

namespace clara::cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// Cutting a list into launches; see Note [Launch arguments]
// ---------------------------------------------------------------------------------------------------------------

// What a kernel's blocks stand for, and so what it must be told.
enum class Work { kChunks, kPathChunks, kTensors };

// Consecutive tensors of a list, and the groups they refer to.
struct Run {
  int64_t first_tensor, last_tensor, first_group, last_group;

  int64_t payload_bytes(Work work) const {
    const int64_t grads = work == Work::kTensors ? 0 : last_tensor - first_tensor;
    return grads * static_cast<int64_t>(sizeof(void*)) +
           (last_group - first_group) * static_cast<int64_t>(sizeof(GroupOptions));
  }
};

// The longest run from `first` on that one launch can take.
Run longest_run(const TensorList& list, int64_t first, Work work) {
  const Run all = {first, list.count, 0, list.group_count};
  if (all.payload_bytes(work) <= LargeArguments::kPayloadBytes) return all;
  Run run = {first, first, list.tensors[first].group, list.tensors[first].group};
  while (run.last_tensor < list.count) {
    const int64_t group = list.tensors[run.last_tensor].group;
    const Run longer = {first, run.last_tensor + 1, group < run.first_group ? group : run.first_group,
                        group >= run.last_group ? group + 1 : run.last_group};
    if (longer.payload_bytes(work) > LargeArguments::kPayloadBytes) break;
    run = longer;
  }
  return run;
}

template <typename Arguments>
void fill(Arguments& arguments, const TensorList& list, const Placement& where, const Run& run, Work work) {
  const Layout offsets = layout(list);
  char* memory = static_cast<char*>(where.memory);
  const bool of_path = work == Work::kPathChunks;
  arguments.tensors = reinterpret_cast<const TensorRecord*>(memory + offsets.tensors);
  arguments.tensor_of_chunk =
      reinterpret_cast<const int32_t*>(memory + (of_path ? offsets.tensor_of_path_chunk : offsets.tensor_of_chunk));
  arguments.arrivals = reinterpret_cast<uint32_t*>(memory + offsets.arrivals);
  arguments.list_count = list.count;
  arguments.partial_sums = reinterpret_cast<ElementSums<float>*>(memory + offsets.partial_sums);
  arguments.sums = nullptr;
  arguments.evidence = reinterpret_cast<Evidence*>(memory + offsets.evidence);
  arguments.grad_scale = list.grad_scale;
  arguments.found_inf = list.found_inf;

  const auto first_chunk_of = [&](int64_t tensor) {
    if (tensor == list.count) return of_path ? list.path_chunk_count : list.chunk_count;
    return of_path ? list.tensors[tensor].first_path_chunk : list.tensors[tensor].first_chunk;
  };
  arguments.first_tensor = run.first_tensor;
  arguments.count = run.last_tensor - run.first_tensor;
  arguments.first_chunk = first_chunk_of(run.first_tensor);
  arguments.chunk_count = first_chunk_of(run.last_tensor) - arguments.first_chunk;
  arguments.first_group = run.first_group;
  arguments.after = After::kNothing;

  const size_t grad_bytes = work == Work::kTensors ? 0 : static_cast<size_t>(arguments.count) * sizeof(void*);
  if (grad_bytes != 0) std::memcpy(arguments.payload, list.grads + run.first_tensor, grad_bytes);
  arguments.groups_offset = static_cast<int32_t>(grad_bytes);
  std::memcpy(arguments.payload + grad_bytes, list.groups + run.first_group,
              static_cast<size_t>(run.last_group - run.first_group) * sizeof(GroupOptions));
}

// Calls enqueue(arguments) for each run of tensors that goes into one launch.
template <typename Enqueue>
void for_each_launch(const TensorList& list, const Placement& where, Work work, Enqueue enqueue) {
  for (int64_t first = 0; first < list.count;) {
    const Run run = longest_run(list, first, work);
    if (run.payload_bytes(work) <= SmallArguments::kPayloadBytes) {
      SmallArguments arguments;
      fill(arguments, list, where, run, work);
      enqueue(arguments);
    } else {
      LargeArguments arguments;
      fill(arguments, list, where, run, work);
      enqueue(arguments);
    }
    first = run.last_tensor;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// The verbs, with the device current
// ---------------------------------------------------------------------------------------------------------------

// Measure for chunks of the path, update for the others.
void enqueue_elements(const TensorList& list, const Placement& where, Work work) {
  if (!supports(list.param_dtype, list.grad_dtype)) {
    throw std::invalid_argument("clara_fused: the CUDA kernels do not serve these storage types");
  }
  const bool measure = work == Work::kPathChunks;
  for_each_launch(list, where, work, [&](const auto& arguments) {
    switch (list.param_dtype) {
      case DType::kFloat32: return launch_elements<float>(measure, list.grad_dtype, where, arguments);
      case DType::kBFloat16: return launch_elements<BFloat16>(measure, list.grad_dtype, where, arguments);
      case DType::kFloat16: return launch_elements<Float16>(measure, list.grad_dtype, where, arguments);
      case DType::kFloat64: return;  // refused above
    }
  });
}

void enqueue_reduce(const TensorList& list, const Placement& where, PathSums* sums, After after) {
  const char* name = after == After::kNothing ? "reduce" : "adapt";
  for_each_launch(list, where, Work::kTensors, [&](auto& arguments) {
    arguments.sums = sums;
    arguments.after = after;
    using Arguments = std::remove_reference_t<decltype(arguments)>;
    launch(name, reduce_kernel<Arguments>, arguments.count, where, arguments);
  });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// The interface
// ---------------------------------------------------------------------------------------------------------------

bool supports(DType param, DType grad) {
  return param != DType::kFloat64 && (grad == param || grad == DType::kFloat32);
}

std::string device_problem(int device) {
  // Kernel parameters beyond 4 KiB came with 12.1; a runtime runs on drivers of its own major version and later ones.
  constexpr int kMinDriver = std::max(12010, CUDART_VERSION / 1000 * 1000);
  try {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion", device);
    if (driver == 0) return "no NVIDIA driver is installed";
    if (driver < kMinDriver) {
      return "the NVIDIA driver serves CUDA " + std::to_string(driver / 1000) + "." +
             std::to_string(driver % 1000 / 10) + "; this build of the core needs one for " +
             std::to_string(kMinDriver / 1000) + "." + std::to_string(kMinDriver % 1000 / 10) +
             " or newer: update the driver";
    }
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount", device);
    if (device >= count) return "there is no such device (" + std::to_string(count) + " in all)";
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, reduce_kernel<SmallArguments>), "loading the kernels", device);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

void number_chunks(TensorList& list, TensorRecord* records) {
  clara::number_chunks(list, records, kChunk, kPathChunk);
}

Layout layout(const TensorList& list) {
  Layout offsets{};
  int64_t end = 0;
  const auto place = [&end](int64_t rows, size_t row_bytes) {
    const int64_t start = end;
    end = chunks_of(end + rows * static_cast<int64_t>(row_bytes), 256) * 256;  // rounded up
    return start;
  };
  offsets.tensors = place(list.count, sizeof(TensorRecord));
  offsets.tensor_of_chunk = place(list.chunk_count, sizeof(int32_t));
  offsets.tensor_of_path_chunk = place(list.path_chunk_count, sizeof(int32_t));
  offsets.arrivals = place(1, sizeof(uint32_t));
  offsets.table_bytes = offsets.arrivals + static_cast<int64_t>(sizeof(uint32_t));
  offsets.partial_sums = place(list.path_chunk_count, sizeof(ElementSums<float>));
  offsets.evidence = place(list.count, sizeof(Evidence));
  offsets.bytes = end;
  return offsets;
}

void write_table(const TensorList& list, void* host_memory) {
  const Layout offsets = layout(list);
  char* memory = static_cast<char*>(host_memory);
  std::memset(memory, 0, static_cast<size_t>(offsets.table_bytes));
  std::copy_n(list.tensors, list.count, reinterpret_cast<TensorRecord*>(memory + offsets.tensors));
  int32_t* of_chunk = reinterpret_cast<int32_t*>(memory + offsets.tensor_of_chunk);
  int32_t* of_path_chunk = reinterpret_cast<int32_t*>(memory + offsets.tensor_of_path_chunk);
  for (int32_t i = 0; i < list.count; ++i) {
    of_chunk = std::fill_n(of_chunk, chunks_of(list.tensors[i].numel, kChunk), i);
    of_path_chunk = std::fill_n(of_path_chunk, chunks_of(path_numel(list.tensors[i]), kPathChunk), i);
  }
}

bool is_table_of(const TensorList& list, const void* host_memory) {
  // The rest of a table follows from its records.
  static_assert(std::has_unique_object_representations_v<TensorRecord>, "padding would be compared too");
  return std::memcmp(list.tensors, host_memory, static_cast<size_t>(list.count) * sizeof(TensorRecord)) == 0;
}

void measure(const TensorList& list, PathSums* sums, const Placement& where) {
  const DeviceGuard guard(where.device);
  enqueue_elements(list, where, Work::kPathChunks);
  enqueue_reduce(list, where, sums, After::kNothing);
}

void adapt(const TensorList& list, const PathSums* sums, Evidence* evidence, const Placement& where) {
  const DeviceGuard guard(where.device);
  for_each_launch(list, where, Work::kTensors, [&](auto& arguments) {
    arguments.sums = const_cast<PathSums*>(sums);  // this kernel only reads them
    arguments.evidence = evidence;
    arguments.after = list.one_scale ? After::kRescaleAll : After::kRescaleOwn;
    using Arguments = std::remove_reference_t<decltype(arguments)>;
    launch("adapt", adapt_kernel<Arguments>, chunks_of(arguments.count, kThreads), where, arguments);
  });
}

void update(const TensorList& list, const Placement& where) {
  const DeviceGuard guard(where.device);
  enqueue_elements(list, where, Work::kChunks);
}

void step(const TensorList& list, const Placement& where) {
  const DeviceGuard guard(where.device);
  enqueue_elements(list, where, Work::kPathChunks);
  enqueue_reduce(list, where, nullptr, list.one_scale ? After::kRescaleAll : After::kRescaleOwn);
  enqueue_elements(list, where, Work::kChunks);
}

}  // namespace clara::cuda
