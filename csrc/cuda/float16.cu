#include "element_launch.cuh"

namespace clara {
namespace cuda {

CLARA_INSTANTIATE_ELEMENT_KERNELS(Float16);

}  // namespace cuda
}  // namespace clara
