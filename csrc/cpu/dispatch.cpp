#include <cstdlib>
#include <cstring>

#if defined(CLARA_CPU_X86_KERNELS)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace clara::cpu {
namespace {

#if defined(CLARA_CPU_X86_KERNELS)
// Asked of the processor itself: __builtin_cpu_supports of clang 14 does not know the name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool can_run_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

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

}  // namespace clara::cpu
