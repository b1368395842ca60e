// The element kernels' entry, one translation unit per storage type of the parameters so that they compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "launch_arguments.h"

namespace clara::cuda {

// Enqueue a kernel for the chunks of `arguments`. P: storage of the parameters.
template <typename P, typename Arguments>
void launch_measure(DType grad, const Placement& where, const Arguments& arguments);

template <typename P, typename Arguments>
void launch_update(DType grad, const Placement& where, const Arguments& arguments);

}  // namespace clara::cuda
