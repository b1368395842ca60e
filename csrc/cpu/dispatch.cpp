#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace clara {
namespace cpu {
namespace {

#if defined(CLARA_CPU_X86_KERNELS)
bool can_run_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool can_run_avx512() {
  return can_run_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Kernels& find_best_kernels() {
#if defined(CLARA_CPU_X86_KERNELS)
  // Also tells whether the operating system saves the registers.
  __builtin_cpu_init();
  const char* wanted = std::getenv("CLARA_CPU_ISA");
  const auto allowed = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  if (allowed("avx512") && can_run_avx512()) return avx512::kKernels;
  if (allowed("avx2") && can_run_avx2()) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& best = find_best_kernels();
  return best;
}

}  // namespace cpu
}  // namespace clara
