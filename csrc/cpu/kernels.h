// One chunk of one tensor: what the vectorized loops of an instruction set offer to the scheduler in cpu_backend.cpp.
#pragma once

#include <cstdint>

#include "../tensor_list.h"

namespace clara {
namespace cpu {

struct Chunk {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* path;
  void* direction;  // where measure leaves Adam's step for apply, in the arithmetic type; null: apply computes it anew
  bool direction_is_cached;  // the caches have what is there now; otherwise measure stores past them
  int64_t numel;
};

enum class MeasureMode {
  kPlain,    // does not touch the parameter
  kCoupled,  // reads the parameter for the coupled weight decay
  kApply,    // also takes the step, with the scale from before (deferred)
};

// Coefficients have the arithmetic type of the parameter: MeasureCoefficients<double> for float64, <float> otherwise.
using MeasureChunk = PartialSums<double> (*)(const Chunk&, const void* measure_coefficients,
                                             const void* apply_coefficients);
using ApplyChunk = void (*)(const Chunk&, const void* apply_coefficients);

struct Kernels {
  const char* instruction_set;
  // Null where the combination of storage types is not served.
  MeasureChunk (*measure)(DType param, DType grad, DType path, MeasureMode mode, bool amsgrad);
  ApplyChunk (*apply)(DType param);
};

namespace baseline {
extern const Kernels kKernels;
}
#if defined(CLARA_CPU_X86_KERNELS)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

// The widest instruction set that was compiled and that this processor (and its operating system) can run; narrower
// if the environment variable CLARA_CPU_ISA names one.
const Kernels& best_kernels();

}  // namespace cpu
}  // namespace clara
