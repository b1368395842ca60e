// The CUDA back end of a build without CUDA. Nothing else knows whether there is one.
#include <stdexcept>

#include "cuda_backend.h"

namespace clara::cuda {
namespace {

constexpr const char* kProblem =
    "the compiled core was built without CUDA; reinstall it where the CUDA toolkit (12.4 or newer) is installed";

}  // namespace

bool supports(DType, DType) { return false; }
std::string device_problem(int) { return kProblem; }

// As no tensor of a CUDA device is served, no list of such tensors comes into being.
void number_chunks(TensorList&, TensorRecord*) { throw std::runtime_error(kProblem); }
Layout layout(const TensorList&) { throw std::runtime_error(kProblem); }
void write_table(const TensorList&, void*) { throw std::runtime_error(kProblem); }
bool is_table_of(const TensorList&, const void*) { throw std::runtime_error(kProblem); }
void measure(const TensorList&, PathSums*, const Placement&) { throw std::runtime_error(kProblem); }
void adapt(const TensorList&, const PathSums*, Evidence*, const Placement&) { throw std::runtime_error(kProblem); }
void update(const TensorList&, const Placement&) { throw std::runtime_error(kProblem); }
void step(const TensorList&, const Placement&) { throw std::runtime_error(kProblem); }

}  // namespace clara::cuda
