#include "element_launch.cuh"

namespace clara {
namespace cuda {

CLARA_INSTANTIATE_ELEMENT_KERNELS(float);

}  // namespace cuda
}  // namespace clara
