// Runs CUDA kernels on the host, so that they can be tested and sanitized without a GPU. Never shipped.
//
// A CUDA thread is a fiber: a stack of its own, left and entered at barriers and shuffles only. All fibers live on one
// thread of the operating system, so a run is repeatable, but the order of blocks, and of the threads of a block between
// two barriers, is shuffled by a seed. The sanitizers are told of the fibers:
// - AddressSanitizer knows their stacks; tensors are heap blocks, so an access past a tensor's end is found.
// - ThreadSanitizer takes every fiber for a thread that is ordered with others by __syncthreads, atomics and the start
//   and end of a launch, and by nothing else: not by having run one after the other, not by a shuffle. A missing
//   barrier is a data race however the fibers happened to be scheduled. Neighbouring blocks (in the order they ran) have
//   different fibers, so races between blocks are found as well.
// A thread that returns while others of its block wait at a barrier ends the program.
//
// What the CUDA runtime's functions do here is in the second part; the third has the intrinsics that the kernels use.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// The emulator's own state is no business of ThreadSanitizer's.
#define EMULATION_UNSEEN __attribute__((no_sanitize("thread"), noinline))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// ---------------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the registers that a callee must keep and the stack pointer, and takes up where `to` was left.
extern "C" void clara_emulation_switch(void** from, void* to);
asm(R"(
.weak clara_emulation_switch
.type clara_emulation_switch, @function
clara_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size clara_emulation_switch, .-clara_emulation_switch
)");
#endif

class Context {
 public:
  // The context of the thread that creates it.
  Context() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // A context that will run entry().
  explicit Context(void (*entry)()) : stack_(new char[kStackBytes]) {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
    // As if it had been left by clara_emulation_switch: six registers, the address to return to; and, for the alignment
    // of a function's entry, one unused word that stands for entry's own return address.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  ~Context() {
#if defined(__SANITIZE_THREAD__)
    if (stack_) __tsan_destroy_fiber(tsan_);
#endif
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  EMULATION_UNSEEN void switch_to(Context& other) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(other.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, other.stack_ ? other.stack_.get() : other.host_stack_,
                                   other.stack_ ? kStackBytes : other.host_stack_bytes_);
#endif
#if defined(__x86_64__)
    clara_emulation_switch(&stack_pointer_, other.stack_pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // To be called first thing in entry().
  EMULATION_UNSEEN static void entered_from([[maybe_unused]] Context& host) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &host.host_stack_, &host.host_stack_bytes_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
};

// ---------------------------------------------------------------------------------------------------------------
// A grid of blocks
// ---------------------------------------------------------------------------------------------------------------

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "emulation: %s\n", message.c_str());
  std::abort();
}

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

inline void synchronize_after([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#endif
}
inline void synchronize_before([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#endif
}

class Emulator {
 public:
  static Emulator& instance() {
    static Emulator emulator;
    return emulator;
  }

  uint64_t seed = 1;

  // Runs kernel() for each thread of the grid.
  EMULATION_UNSEEN void run(const std::function<void()>& kernel, unsigned blocks, unsigned threads) {
    if (threads == 0 || threads > kMaxThreads || threads % kWarpSize != 0) fail("unsupported size of a block");
    kernel_ = &kernel;
    ::blockDim = {threads};
    ::gridDim = {blocks};
    threads_ = static_cast<int>(threads);
    std::minstd_rand random(static_cast<unsigned>(seed++));
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    synchronize_before(&launch_);
    for (unsigned block : order) {
      ::blockIdx = {block};
      pool_ = 1 - pool_;
      run_block(random);
    }
    synchronize_after(&finished_);
  }

  EMULATION_UNSEEN void wait_for_block() {
    Barrier& barrier = block_barriers_[pool_][rounds_[current_]++ % 2];
    synchronize_before(&barrier);
    wait(State::kAtBlockBarrier);
    synchronize_after(&barrier);
  }

  // The value that `source_lane` of this warp gave. No memory is ordered by it.
  template <typename T>
  EMULATION_UNSEEN T exchange(T value, int source_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&exchanged_[current_], &value, sizeof(T));
    wait(State::kAtWarpBarrier);
    T result;
    std::memcpy(&result, &exchanged_[current_ / kWarpSize * kWarpSize + source_lane], sizeof(T));
    wait(State::kAtWarpBarrier);
    return result;
  }

  EMULATION_UNSEEN int lane() const { return current_ % kWarpSize; }

 private:
  enum class State : char { kReady, kAtBlockBarrier, kAtWarpBarrier, kFinished };
  struct Barrier {
    char address;  // ThreadSanitizer's name for it
  };

  EMULATION_UNSEEN static void fiber_main() {
    Emulator& e = instance();
    Context::entered_from(e.host_);
    for (;;) {
      synchronize_after(&e.launch_);
      (*e.kernel_)();
      synchronize_before(&e.finished_);
      e.wait(State::kFinished);
    }
  }

  EMULATION_UNSEEN void wait(State state) {
    const int self = current_;
    state_[self] = state;
    fibers_[pool_][self]->switch_to(host_);
    current_ = self;
  }

  EMULATION_UNSEEN void enter(int thread) {
    if (!fibers_[pool_][thread]) fibers_[pool_][thread] = std::make_unique<Context>(fiber_main);
    state_[thread] = State::kReady;
    current_ = thread;
    ::threadIdx = {static_cast<unsigned>(thread)};
    host_.switch_to(*fibers_[pool_][thread]);
  }

  // Threads run in a rotated order, forwards or backwards, each until it has to wait; then whoever may go on does.
  template <typename Random>
  EMULATION_UNSEEN void run_block(Random& random) {
    const int start = static_cast<int>(random() % static_cast<unsigned>(threads_));
    const bool backwards = random() % 2 == 0;
    for (int i = 0; i < threads_; ++i) {
      state_[i] = State::kReady;
      rounds_[i] = 0;
    }
    for (;;) {
      int finished = 0;
      bool progress = false;
      for (int i = 0; i < threads_; ++i) {
        const int thread = (start + (backwards ? threads_ - i : i)) % threads_;
        if (state_[thread] == State::kReady) {
          enter(thread);
          progress = true;
        }
        finished += state_[thread] == State::kFinished;
      }
      if (finished == threads_) return;
      progress = release_warps() || progress;
      if (finished > 0 && !progress) fail("threads wait at a barrier that others have passed by or never reach");
      if (finished == 0 && all_at(0, threads_, State::kAtBlockBarrier)) {
        release(0, threads_);
        progress = true;
      }
      if (!progress) fail("threads of a block wait at different barriers");
    }
  }

  EMULATION_UNSEEN bool all_at(int first, int last, State state) const {
    for (int i = first; i < last; ++i) {
      if (state_[i] != state) return false;
    }
    return true;
  }

  EMULATION_UNSEEN void release(int first, int last) {
    for (int i = first; i < last; ++i) state_[i] = State::kReady;
  }

  EMULATION_UNSEEN bool release_warps() {
    bool any = false;
    for (int first = 0; first < threads_; first += kWarpSize) {
      if (all_at(first, first + kWarpSize, State::kAtWarpBarrier)) {
        release(first, first + kWarpSize);
        any = true;
      }
    }
    return any;
  }

  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0, current_ = 0, pool_ = 0;
  Context host_;
  std::unique_ptr<Context> fibers_[2][kMaxThreads];
  State state_[kMaxThreads];
  unsigned rounds_[kMaxThreads];
  uint64_t exchanged_[kMaxThreads];
  Barrier block_barriers_[2][2];
  char launch_ = 0, finished_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------
// The CUDA runtime
// ---------------------------------------------------------------------------------------------------------------

// What a test may look at or set.
struct Runtime {
  static constexpr int kDevices = 2;
  int device = 0;           // current
  int driver_version = 13000;
  int launches = 0;         // so far
  int last_launch_device = -1;
  void* last_launch_stream = nullptr;
  bool next_launch_fails = false;
};
inline Runtime runtime;

}  // namespace emulation

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };
struct cudaFuncAttributes {};

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidDevice";
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated failure"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::runtime.device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::Runtime::kDevices) return cudaErrorInvalidDevice;
  emulation::runtime.device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulation::Runtime::kDevices;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::runtime.driver_version;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(const Arguments&), dim3 grid, dim3 block, void** parameters, size_t,
                             cudaStream_t stream) {
  emulation::Runtime& runtime = emulation::runtime;
  if (std::exchange(runtime.next_launch_fails, false)) return cudaErrorLaunchFailure;
  runtime.launches += 1;
  runtime.last_launch_device = runtime.device;
  runtime.last_launch_stream = stream;
  const auto arguments = std::make_unique<Arguments>(*static_cast<const Arguments*>(parameters[0]));
  emulation::Emulator::instance().run([&] { kernel(*arguments); }, grid.x, block.x);
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// The language and its intrinsics
// ---------------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__ &    // one copy, seen by all threads
#define __shared__ static      // blocks run one after the other
#define __builtin_assume(...)

inline void __syncthreads() { emulation::Emulator::instance().wait_for_block(); }
inline void __threadfence() {}  // atomics order memory here

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  emulation::Emulator& emulator = emulation::Emulator::instance();
  const int source = emulator.lane() + distance;
  return emulator.exchange(value, source < emulation::kWarpSize ? source : emulator.lane());
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// bfloat16 and float16 as bit patterns, converted by the compiler where it knows the type, otherwise by hand.
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

struct __half {
  _Float16 value;
};
inline __half __ushort_as_half(uint16_t bits) { return {std::bit_cast<_Float16>(bits)}; }
inline uint16_t __half_as_ushort(__half x) { return std::bit_cast<uint16_t>(x.value); }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

inline int nvtxRangePushA(const char*) { return 0; }
inline int nvtxRangePop() { return 0; }
