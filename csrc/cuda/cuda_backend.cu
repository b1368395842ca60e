#include "cuda_backend.h"

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "element_launch.h"
#include "launch.h"
#include "launch_arguments.h"
#include "scalar_kernels.cuh"
#include "storage.cuh"

namespace clara {
namespace cuda {
namespace {

constexpr int64_t aligned_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// A named stretch of time in a profiler's view; free when none listens.
class ProfilerRange {
 public:
  ProfilerRange(const char* verb, const TensorList& list) {
    constexpr const char* kVariantNames[] = {"global", "local", "smoothed"};
    char text[96];
    std::snprintf(text, sizeof text, "clara.%s (%s, %lld tensors)", verb,
                  kVariantNames[static_cast<int>(list.variant)], static_cast<long long>(list.count));
    nvtxRangePushA(text);
  }
  ~ProfilerRange() { nvtxRangePop(); }
  ProfilerRange(const ProfilerRange&) = delete;
  ProfilerRange& operator=(const ProfilerRange&) = delete;
};

// ---------------------------------------------------------------------------------------------------------------
// Cutting a list into launches; see Note [Launch arguments]
// ---------------------------------------------------------------------------------------------------------------

// Consecutive tensors of a list, and the groups they refer to.
struct Run {
  int64_t first_tensor, last_tensor;
  int32_t first_group, last_group;

  int64_t payload_bytes(bool with_grads) const {
    const int64_t grads = with_grads ? (last_tensor - first_tensor) * static_cast<int64_t>(sizeof(void*)) : 0;
    return grads + (last_group - first_group) * static_cast<int64_t>(sizeof(GroupOptions));
  }
};

// The longest run from `first` on that one launch can take.
Run longest_run(const TensorList& list, int64_t first, bool with_grads) {
  const Run all = {first, list.count, 0, static_cast<int32_t>(list.group_count)};
  if (all.payload_bytes(with_grads) <= LargeArguments::kPayloadBytes) return all;
  Run run = {first, first, list.tensors[first].group, list.tensors[first].group};
  while (run.last_tensor < list.count) {
    const int32_t group = list.tensors[run.last_tensor].group;
    const Run longer = {first, run.last_tensor + 1, group < run.first_group ? group : run.first_group,
                        group >= run.last_group ? group + 1 : run.last_group};
    if (longer.payload_bytes(with_grads) > LargeArguments::kPayloadBytes) break;
    run = longer;
  }
  return run;
}

template <typename Arguments>
void fill(Arguments& arguments, const TensorList& list, const Placement& where, const Run& run, bool with_grads) {
  const Layout offsets = layout(list.count, list.chunk_count);
  char* memory = static_cast<char*>(where.memory);
  arguments.tensors = reinterpret_cast<const TensorRecord*>(memory + offsets.tensors);
  arguments.tensor_of_chunk = reinterpret_cast<const int32_t*>(memory + offsets.tensor_of_chunk);
  arguments.arrivals = reinterpret_cast<uint32_t*>(memory + offsets.arrivals);
  arguments.partial_sums = reinterpret_cast<PartialSums<float>*>(memory + offsets.partial_sums);
  arguments.sums = reinterpret_cast<PathSums*>(memory + offsets.sums);
  arguments.list_count = list.count;
  arguments.grad_scale = list.grad_scale;
  arguments.found_inf = list.found_inf;

  arguments.first_tensor = run.first_tensor;
  arguments.count = run.last_tensor - run.first_tensor;
  arguments.first_chunk = list.tensors[run.first_tensor].first_chunk;
  const int64_t end_chunk =
      run.last_tensor < list.count ? list.tensors[run.last_tensor].first_chunk : list.chunk_count;
  arguments.chunk_count = end_chunk - arguments.first_chunk;
  arguments.first_group = run.first_group;
  arguments.after = After::kNothing;
  arguments.adapts = 0;

  const size_t grad_bytes = with_grads ? static_cast<size_t>(arguments.count) * sizeof(void*) : 0;
  if (with_grads) std::memcpy(arguments.payload, list.grads + run.first_tensor, grad_bytes);
  arguments.groups_offset = static_cast<int32_t>(grad_bytes);
  std::memcpy(arguments.payload + grad_bytes, list.groups + run.first_group,
              static_cast<size_t>(run.last_group - run.first_group) * sizeof(GroupOptions));
}

// Calls enqueue(arguments) for each run of tensors that goes into one launch.
template <typename Enqueue>
void for_each_launch(const TensorList& list, const Placement& where, bool with_grads, Enqueue enqueue) {
  for (int64_t first = 0; first < list.count;) {
    const Run run = longest_run(list, first, with_grads);
    if (run.payload_bytes(with_grads) <= SmallArguments::kPayloadBytes) {
      SmallArguments arguments;
      fill(arguments, list, where, run, with_grads);
      enqueue(arguments);
    } else {
      LargeArguments arguments;
      fill(arguments, list, where, run, with_grads);
      enqueue(arguments);
    }
    first = run.last_tensor;
  }
}

// Calls call(a value of the type that parameters are stored in).
template <typename Call>
void with_param_type(DType dtype, Call call) {
  switch (dtype) {
    case DType::kFloat32: return call(float{});
    case DType::kBFloat16: return call(BFloat16{});
    case DType::kFloat16: return call(Float16{});
    case DType::kFloat64: break;
  }
  throw std::invalid_argument("clara_fused: the CUDA kernels do not serve float64 parameters");
}

// ---------------------------------------------------------------------------------------------------------------
// The verbs, with the device current
// ---------------------------------------------------------------------------------------------------------------

LaunchTarget target_of(const Placement& where) { return {where.device, static_cast<cudaStream_t>(where.stream)}; }

void enqueue_measure(const TensorList& list, const Placement& where) {
  const StorageTypes types = {list.param_dtype, list.grad_dtype, list.path_dtype};
  if (!supports(types.param, types.grad, types.path)) {
    throw std::invalid_argument("clara_fused: the CUDA kernels do not serve these storage types");
  }
  const ProfilerRange range(list.deferred ? "measure_and_apply" : "measure", list);
  for_each_launch(list, where, /*with_grads=*/true, [&](const auto& arguments) {
    with_param_type(types.param, [&](auto param) {
      launch_measure<decltype(param)>(types, list.deferred != 0, target_of(where), arguments);
    });
  });
}

void enqueue_reduce(const TensorList& list, const Placement& where, PathSums* sums, After after) {
  const ProfilerRange range(after == After::kNothing ? "reduce" : "adapt", list);
  for_each_launch(list, where, /*with_grads=*/false, [&](auto& arguments) {
    if (sums != nullptr) arguments.sums = sums;
    arguments.after = after;
    using Arguments = std::remove_reference_t<decltype(arguments)>;
    launch(after == After::kNothing ? "reduce" : "reduce_and_adapt", reduce_kernel<Arguments>, arguments.count,
           kThreads, target_of(where), arguments);
  });
}

void enqueue_apply(const TensorList& list, const Placement& where) {
  if (list.deferred) return;
  const ProfilerRange range("apply", list);
  for_each_launch(list, where, /*with_grads=*/false, [&](const auto& arguments) {
    with_param_type(list.param_dtype,
                    [&](auto param) { launch_apply<decltype(param)>(target_of(where), arguments); });
  });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// The interface
// ---------------------------------------------------------------------------------------------------------------

bool supports(DType param, DType grad, DType path) {
  return param != DType::kFloat64 && (grad == param || grad == DType::kFloat32) &&
         (path == DType::kFloat32 || path == DType::kBFloat16);
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

Layout layout(int64_t count, int64_t chunk_count) {
  Layout offsets{};
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end = aligned_up(end + bytes);
    return start;
  };
  offsets.tensors = place(count * static_cast<int64_t>(sizeof(TensorRecord)));
  offsets.tensor_of_chunk = place(chunk_count * static_cast<int64_t>(sizeof(int32_t)));
  offsets.arrivals = place(sizeof(uint32_t));
  offsets.table_bytes = offsets.arrivals + static_cast<int64_t>(sizeof(uint32_t));
  offsets.partial_sums = place(chunk_count * static_cast<int64_t>(sizeof(PartialSums<float>)));
  offsets.sums = place(count * static_cast<int64_t>(sizeof(PathSums)));
  offsets.bytes = end;
  return offsets;
}

void write_table(const TensorRecord* tensors, int64_t count, void* host_memory) {
  int64_t chunk_count = 0;
  for (int64_t i = 0; i < count; ++i) chunk_count += chunks_of(tensors[i].numel);
  const Layout offsets = layout(count, chunk_count);
  char* memory = static_cast<char*>(host_memory);
  std::memset(memory, 0, static_cast<size_t>(offsets.table_bytes));
  std::copy_n(tensors, count, reinterpret_cast<TensorRecord*>(memory + offsets.tensors));
  int32_t* tensor_of_chunk = reinterpret_cast<int32_t*>(memory + offsets.tensor_of_chunk);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t chunk = chunks_of(tensors[i].numel); chunk > 0; --chunk) *tensor_of_chunk++ = static_cast<int32_t>(i);
  }
}

void measure(const TensorList& list, const Placement& where) {
  const DeviceGuard guard(where.device);
  enqueue_measure(list, where);
  enqueue_reduce(list, where, list.sums, After::kNothing);
}

void adapt(const TensorList& list, const PathSums* sums, const Placement& where) {
  const DeviceGuard guard(where.device);
  const ProfilerRange range("adapt", list);
  for_each_launch(list, where, /*with_grads=*/false, [&](auto& arguments) {
    arguments.sums = const_cast<PathSums*>(sums);  // this kernel only reads them
    arguments.adapts = sums != nullptr;
    using Arguments = std::remove_reference_t<decltype(arguments)>;
    launch("adapt", adapt_kernel<Arguments>, (arguments.count + kThreads - 1) / kThreads, kThreads, target_of(where),
           arguments);
  });
}

void apply(const TensorList& list, const Placement& where) {
  const DeviceGuard guard(where.device);
  enqueue_apply(list, where);
}

void step(const TensorList& list, const Placement& where) {
  const DeviceGuard guard(where.device);
  enqueue_measure(list, where);
  enqueue_reduce(list, where, nullptr, list.variant == Variant::kGlobal ? After::kAdaptAll : After::kAdaptOwn);
  enqueue_apply(list, where);
}

}  // namespace cuda
}  // namespace clara
