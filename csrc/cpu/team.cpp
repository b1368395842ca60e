#include "team.h"

#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace clara::cpu {
namespace {

// The entry points of GNU OpenMP, which LLVM's and Intel's runtimes export as well.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* argument, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  bool found() const { return parallel != nullptr && thread_num != nullptr && num_threads != nullptr; }
};

#if defined(__linux__)
template <typename Function>
void look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
}

OpenMp functions_of(void* library) {
  OpenMp openmp;
  look_up(library, "GOMP_parallel", openmp.parallel);
  look_up(library, "omp_get_thread_num", openmp.thread_num);
  look_up(library, "omp_get_num_threads", openmp.num_threads);
  return openmp;
}

OpenMp find_openmp() {
  // Through torch's own library first: other packages may have brought further OpenMP runtimes into the process.
  if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    const OpenMp openmp = functions_of(torch);
    dlclose(torch);
    if (openmp.found()) return openmp;
  }
  return functions_of(RTLD_DEFAULT);
}
#else
OpenMp find_openmp() { return {}; }
#endif

const OpenMp& openmp() {
  static const OpenMp found = find_openmp();
  return found;
}

void run_member(void* body) {
  (*static_cast<const TeamBody*>(body))(openmp().thread_num(), openmp().num_threads());
}

void run_fresh_threads(int threads, const TeamBody& body) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  for (int member = 1; member < threads; ++member) others.emplace_back(std::cref(body), member, threads);
  body(0, threads);
  for (std::thread& other : others) other.join();
}

}  // namespace

void run_team(int threads, const TeamBody& body) {
  if (threads <= 1) {
    body(0, 1);
  } else if (openmp().found()) {
    openmp().parallel(run_member, const_cast<TeamBody*>(&body), static_cast<unsigned>(threads), 0);
  } else {
    run_fresh_threads(threads, body);
  }
}

const char* thread_source() { return openmp().found() ? "openmp" : "std::thread"; }

}  // namespace clara::cpu
