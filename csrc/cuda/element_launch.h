// The element kernels' entry, one translation unit per storage type of the parameters so that they compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "launch_arguments.h"

namespace clara {
namespace cuda {

struct StorageTypes {
  DType param, grad, path;
};

// Enqueues measure (and apply, if so) for the chunks of `arguments`. P: storage of the parameters.
template <typename P, typename Arguments>
void launch_measure(const StorageTypes& types, bool and_apply, const LaunchTarget& target, const Arguments& arguments);

template <typename P, typename Arguments>
void launch_apply(const LaunchTarget& target, const Arguments& arguments);

}  // namespace cuda
}  // namespace clara
