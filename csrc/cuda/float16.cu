#include "element_launch.cuh"

namespace clara::cuda {

CLARA_INSTANTIATE_ELEMENT_KERNELS(Float16);

}  // namespace clara::cuda
