// Runs CUDA kernels on the host, so that they can be tested and sanitized without a GPU. Never shipped.
//
// A CUDA thread is a fiber: a stack of its own, left and entered at barriers and shuffles only. Blocks run one after the
// other, so a run is repeatable, but their order, and that of the threads of a block between two barriers, is shuffled by
// a seed. The sanitizers are told of the fibers:
// - AddressSanitizer knows their stacks; tensors are heap blocks, so an access past a tensor's end is found.
// - ThreadSanitizer takes every fiber for a thread that is ordered with others by __syncthreads, atomics and the start
//   and end of a launch, and by nothing else: not by having run one after the other, not by a shuffle. A missing
//   barrier is a data race however the fibers happened to be scheduled. So are conflicting accesses of two blocks: half of
//   the blocks run on one thread of the operating system, with fibers and shared memory of its own, half on another.
// A thread that returns while others of its block wait at a barrier ends the program.
//
// What the CUDA runtime's functions do here is in the second part; the third has the intrinsics that the kernels use.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
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

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

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

// A kernel's launch: what to run for each thread of the grid.
struct Launch {
  const std::function<void()>* kernel;
  unsigned blocks, threads;
};

// A thread of the operating system that runs blocks, one after the other. Its fibers stay with it.
class BlockRunner {
 public:
  BlockRunner() : thread_([this] { serve(); }) {}
  ~BlockRunner() {
    stopping_ = true;
    start_.release();
    thread_.join();
    for (Context* fiber : fibers_) delete fiber;
  }

  // The host's three parts in a launch. Between the first and the last of them it must learn nothing of what threads of
  // the device did, or it would order the blocks of two runners.
  void prepare(const Launch& launch, std::vector<unsigned> blocks, unsigned seed) {
    launch_ = launch;
    blocks_ = std::move(blocks);
    random_.seed(seed);
    synchronize_before(&launched_);
  }
  void run() {
    start_.release();
    done_.acquire();
  }
  void finish() { synchronize_after(&finished_); }

  static BlockRunner& current() { return *current_runner_; }

  EMULATION_UNSEEN void wait_for_block() {
    char* barrier = &barriers_[rounds_[fiber_]++ % 2];
    synchronize_before(barrier);
    wait(State::kAtBlockBarrier);
    synchronize_after(barrier);
  }

  // The value that `source_lane` of this warp gives. No memory is ordered by it.
  template <typename T>
  EMULATION_UNSEEN T exchange(T value, int source_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&exchanged_[fiber_], &value, sizeof(T));
    wait(State::kAtWarpBarrier);
    T result;
    std::memcpy(&result, &exchanged_[fiber_ / kWarpSize * kWarpSize + source_lane], sizeof(T));
    wait(State::kAtWarpBarrier);
    return result;
  }

  EMULATION_UNSEEN int lane() const { return fiber_ % kWarpSize; }

 private:
  enum class State : char { kReady, kAtBlockBarrier, kAtWarpBarrier, kFinished };

  void serve() {
    current_runner_ = this;
    host_ = new Context;
    for (;;) {
      start_.acquire();
      if (stopping_) break;
      for (unsigned block : blocks_) run_block(block);
      done_.release();
    }
    delete host_;
  }

  EMULATION_UNSEEN static void fiber_main() {
    BlockRunner& self = current();
    Context::entered_from(*self.host_);
    for (;;) {
      synchronize_after(&self.launched_);
      synchronize_after(&self.finished_);  // the block before had the same shared memory
      (*self.launch_.kernel)();
      synchronize_before(&self.finished_);
      self.wait(State::kFinished);
    }
  }

  EMULATION_UNSEEN void wait(State state) {
    const int self = fiber_;
    states_[self] = state;
    fibers_[self]->switch_to(*host_);
  }

  EMULATION_UNSEEN void enter(int thread) {
    if (fibers_[thread] == nullptr) fibers_[thread] = new Context(fiber_main);
    states_[thread] = State::kReady;
    fiber_ = thread;
    ::threadIdx = {static_cast<unsigned>(thread)};
    host_->switch_to(*fibers_[thread]);
  }

  // Threads run in a rotated order, forwards or backwards, each until it has to wait; then whoever may go on does.
  EMULATION_UNSEEN void run_block(unsigned block) {
    ::blockIdx = {block};
    ::blockDim = {launch_.threads};
    ::gridDim = {launch_.blocks};
    threads_ = static_cast<int>(launch_.threads);
    const int start = static_cast<int>(random_() % static_cast<unsigned>(threads_));
    const bool backwards = random_() % 2 == 0;
    for (int i = 0; i < threads_; ++i) {
      states_[i] = State::kReady;
      rounds_[i] = 0;
    }
    for (;;) {
      int finished = 0;
      bool progress = false;
      for (int i = 0; i < threads_; ++i) {
        const int thread = (start + (backwards ? threads_ - i : i)) % threads_;
        if (states_[thread] == State::kReady) {
          enter(thread);
          progress = true;
        }
        finished += states_[thread] == State::kFinished;
      }
      if (finished == threads_) return;
      for (int warp = 0; warp < threads_; warp += kWarpSize) {
        progress = release_if_all(warp, warp + kWarpSize, State::kAtWarpBarrier) || progress;
      }
      progress = release_if_all(0, threads_, State::kAtBlockBarrier) || progress;
      if (!progress) fail("threads of a block wait at a barrier that others have passed by or never reach");
    }
  }

  EMULATION_UNSEEN bool release_if_all(int first, int last, State waiting) {
    for (int i = first; i < last; ++i) {
      if (states_[i] != waiting) return false;
    }
    for (int i = first; i < last; ++i) states_[i] = State::kReady;
    return true;
  }

  inline static thread_local BlockRunner* current_runner_ = nullptr;

  Launch launch_{};
  std::vector<unsigned> blocks_;
  std::minstd_rand random_;
  bool stopping_ = false;
  std::binary_semaphore start_{0}, done_{0};

  int threads_ = 0, fiber_ = 0;
  Context* host_ = nullptr;
  Context* fibers_[kMaxThreads] = {};
  State states_[kMaxThreads];
  unsigned rounds_[kMaxThreads];
  uint64_t exchanged_[kMaxThreads];
  // ThreadSanitizer's names for what orders threads. Two barriers take turns: who has reached the next one must not be
  // mistaken for having been at the last one in time.
  char launched_ = 0, finished_ = 0, barriers_[2] = {};
  std::thread thread_;
};

// The device: runs the blocks of a grid in an order that depends on the seed.
class Emulator {
 public:
  static Emulator& instance() {
    static Emulator emulator;
    return emulator;
  }

  uint64_t seed = 1;

  void run(const std::function<void()>& kernel, unsigned blocks, unsigned threads) {
    if (threads == 0 || threads > kMaxThreads || threads % kWarpSize != 0) fail("unsupported size of a block");
    std::minstd_rand random(static_cast<unsigned>(seed++));
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    const auto middle = order.begin() + blocks / 2;
    const Launch launch = {&kernel, blocks, threads};
    runners_[0].prepare(launch, {order.begin(), middle}, static_cast<unsigned>(random()));
    runners_[1].prepare(launch, {middle, order.end()}, static_cast<unsigned>(random()));
    for (BlockRunner& runner : runners_) runner.run();
    for (BlockRunner& runner : runners_) runner.finish();
  }

 private:
  BlockRunner runners_[2];
};

// ---------------------------------------------------------------------------------------------------------------
// The CUDA runtime
// ---------------------------------------------------------------------------------------------------------------

}  // namespace emulation

#define CUDART_VERSION 13000
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };

namespace emulation {

// What a test may look at or set.
struct Runtime {
  static constexpr int kDevices = 2;
  int device = 0;           // current
  int driver_version = 13000;
  int launches = 0;         // so far
  int last_launch_device = -1;
  void* last_launch_stream = nullptr;
  bool next_launch_fails = false;
  cudaError_t last_error = cudaSuccess;  // kept until somebody asks for it

  cudaError_t failed(cudaError_t error) { return last_error = error; }
};
inline Runtime runtime;

// What the kernels load and store of the elements of tensors, as csrc/cuda/storage.cuh reports it.
struct Traffic {
  struct Count {
    std::atomic<int64_t> accesses = 0, bytes = 0;
    // Relaxed: orders nothing, so hides no race from ThreadSanitizer.
    void add(size_t size) {
      accesses.fetch_add(1, std::memory_order_relaxed);
      bytes.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
    }
    void reset() { accesses = bytes = 0; }
  };
  Count loads, stores;
};
inline Traffic traffic;

}  // namespace emulation

#define CLARA_COUNT_LOAD(size) emulation::traffic.loads.add(size)
#define CLARA_COUNT_STORE(size) emulation::traffic.stores.add(size)

using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {};

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidDevice";
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated failure"; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::runtime.last_error, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::runtime.device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::Runtime::kDevices) {
    return emulation::runtime.failed(cudaErrorInvalidDevice);
  }
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
  if (std::exchange(runtime.next_launch_fails, false)) return runtime.failed(cudaErrorLaunchFailure);
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
#define __shared__ static thread_local
#define __builtin_assume(...)

inline void __syncthreads() { emulation::BlockRunner::current().wait_for_block(); }
inline void __threadfence() {}  // atomics order memory here

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  emulation::BlockRunner& runner = emulation::BlockRunner::current();
  const int source = runner.lane() + distance;
  return runner.exchange(value, source < emulation::kWarpSize ? source : runner.lane());
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline int __ffs(int value) { return __builtin_ffs(value); }

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
