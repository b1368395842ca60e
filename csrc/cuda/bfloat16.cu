#include "element_launch.cuh"

namespace clara {
namespace cuda {

CLARA_INSTANTIATE_ELEMENT_KERNELS(BFloat16);

}  // namespace cuda
}  // namespace clara
