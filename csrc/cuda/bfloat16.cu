#include "element_kernels.cuh"

namespace clara::cuda {

CLARA_INSTANTIATE_ELEMENT_KERNELS(BFloat16);

}  // namespace clara::cuda
