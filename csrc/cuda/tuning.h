// The shape of the CUDA kernels' work. Every value may be set on the compiler's command line, which is how
// benchmarks/device_pass.sh compares them.
#pragma once

#include <cstdint>

#ifndef CLARA_CUDA_THREADS
#define CLARA_CUDA_THREADS 256
#endif
#ifndef CLARA_CUDA_CHUNK
#define CLARA_CUDA_CHUNK 4096
#endif
#ifndef CLARA_CUDA_PATH_CHUNK
#define CLARA_CUDA_PATH_CHUNK 2048
#endif
#ifndef CLARA_CUDA_UPDATE_THREADS_PER_SM
#define CLARA_CUDA_UPDATE_THREADS_PER_SM 1024
#endif
#ifndef CLARA_CUDA_MEASURE_THREADS_PER_SM
#define CLARA_CUDA_MEASURE_THREADS_PER_SM 1024
#endif

namespace clara::cuda {

constexpr int kThreads = CLARA_CUDA_THREADS;  // of a block, in every kernel

// Elements per chunk of update, path elements per chunk of measure; see Note [Chunks]. Small enough that what the blocks
// read at one time lies close together in memory (docs/log/gpu.md), large enough that a block spends its time on
// elements rather than on looking up its tensor.
constexpr int64_t kChunk = CLARA_CUDA_CHUNK;
constexpr int64_t kPathChunk = CLARA_CUDA_PATH_CHUNK;

// How many blocks a multiprocessor is to hold at once: what the compiler may spend registers for. sm_75 holds 1024
// threads.
constexpr int blocks_per_sm(int threads) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return (threads < 1024 ? threads : 1024) / kThreads;
#else
  return threads / kThreads;
#endif
}
constexpr int kUpdateBlocks = blocks_per_sm(CLARA_CUDA_UPDATE_THREADS_PER_SM);
constexpr int kMeasureBlocks = blocks_per_sm(CLARA_CUDA_MEASURE_THREADS_PER_SM);

}  // namespace clara::cuda
