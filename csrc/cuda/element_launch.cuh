// From dtype codes to instances of the element kernels.
#pragma once

#include "element_kernels.cuh"
#include "element_launch.h"

namespace clara::cuda {

template <typename P, typename Arguments>
void launch_measure(DType grad, const LaunchTarget& target, const Arguments& arguments) {
  const auto kernel = grad == DType::kFloat32 ? measure_kernel<P, float, Arguments> : measure_kernel<P, P, Arguments>;
  launch("measure", kernel, arguments.chunk_count, kThreads, target, arguments);
}

template <typename P, typename Arguments>
void launch_update(DType grad, const LaunchTarget& target, const Arguments& arguments) {
  const auto kernel = grad == DType::kFloat32 ? update_kernel<P, float, Arguments> : update_kernel<P, P, Arguments>;
  launch("update", kernel, arguments.chunk_count, kThreads, target, arguments);
}

#define CLARA_INSTANTIATE_ELEMENT_KERNELS(P)                                                   \
  template void launch_measure<P>(DType, const LaunchTarget&, const SmallArguments&);          \
  template void launch_measure<P>(DType, const LaunchTarget&, const LargeArguments&);          \
  template void launch_update<P>(DType, const LaunchTarget&, const SmallArguments&);           \
  template void launch_update<P>(DType, const LaunchTarget&, const LargeArguments&)

}  // namespace clara::cuda
