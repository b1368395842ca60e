// What the vectorized loops of an instruction set offer to the scheduler in cpu_backend.cpp.
#pragma once

#include <cstdint>

#include "../tensor_list.h"

namespace clara::cpu {

// A chunk of a tensor of the list (see Note [Chunks]); update: after the step has been counted.
using MeasureChunk = ElementSums<double> (*)(const TensorList&, int64_t tensor, int64_t chunk);
using UpdateChunk = void (*)(const TensorList&, int64_t tensor, int64_t chunk);

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
