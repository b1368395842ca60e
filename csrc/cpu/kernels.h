// One chunk of one tensor: what the vectorized loops of an instruction set offer to the scheduler in cpu_backend.cpp.
#pragma once

#include <cstdint>

#include "../tensor_list.h"

namespace clara::cpu {

struct Chunk {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* path;
  int64_t count;  // of elements in update, of elements with a path in measure
  int64_t run, kept;  // see Note [Sampled path]
};

// Coefficients have the arithmetic type of the parameter: double for float64, float otherwise.
using MeasureChunk = ElementSums<double> (*)(const Chunk&, const void* measure_coefficients);
using UpdateChunk = void (*)(const Chunk&, const void* update_coefficients);

struct Loops {
  MeasureChunk measure;
  UpdateChunk update;
};

struct Kernels {
  const char* instruction_set;
  // Nulls where the combination of storage types is not served.
  Loops (*loops)(DType param, DType grad);
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

}  // namespace clara::cpu
