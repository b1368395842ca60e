// From dtype codes to instances of the element kernels.
#pragma once

#include "element_kernels.cuh"
#include "element_launch.h"

namespace clara {
namespace cuda {

template <typename P, typename G, typename S, typename Arguments>
void launch_measure_of(bool and_apply, const LaunchTarget& target, const Arguments& arguments) {
  if (and_apply) {
    launch("measure_and_apply", measure_kernel<true, P, G, S, Arguments>, arguments.chunk_count, kThreads, target,
           arguments);
  } else {
    launch("measure", measure_kernel<false, P, G, S, Arguments>, arguments.chunk_count, kThreads, target, arguments);
  }
}

template <typename P, typename G, typename Arguments>
void launch_measure_with_grad(DType path, bool and_apply, const LaunchTarget& target, const Arguments& arguments) {
  if (path == DType::kFloat32) {
    launch_measure_of<P, G, float>(and_apply, target, arguments);
  } else {
    launch_measure_of<P, G, BFloat16>(and_apply, target, arguments);
  }
}

template <typename P, typename Arguments>
void launch_measure(const StorageTypes& types, bool and_apply, const LaunchTarget& target, const Arguments& arguments) {
  if (types.grad == DType::kFloat32) {
    launch_measure_with_grad<P, float>(types.path, and_apply, target, arguments);
  } else {
    launch_measure_with_grad<P, P>(types.path, and_apply, target, arguments);
  }
}

template <typename P, typename Arguments>
void launch_apply(const LaunchTarget& target, const Arguments& arguments) {
  launch("apply", apply_kernel<P, Arguments>, arguments.chunk_count, kThreads, target, arguments);
}

#define CLARA_INSTANTIATE_ELEMENT_KERNELS(P)                                                                      \
  template void launch_measure<P, SmallArguments>(const StorageTypes&, bool, const LaunchTarget&,                 \
                                                  const SmallArguments&);                                         \
  template void launch_measure<P, LargeArguments>(const StorageTypes&, bool, const LaunchTarget&,                 \
                                                  const LargeArguments&);                                         \
  template void launch_apply<P, SmallArguments>(const LaunchTarget&, const SmallArguments&);                      \
  template void launch_apply<P, LargeArguments>(const LaunchTarget&, const LargeArguments&)

}  // namespace cuda
}  // namespace clara
