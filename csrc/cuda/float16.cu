#include "element_kernels.cuh"

namespace clara::cuda {

CLARA_INSTANTIATE_ELEMENT_KERNELS(Float16);

}  // namespace clara::cuda
