// Storage types, and loads and stores of up to four neighbouring elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../tensor_list.h"

namespace clara::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Rounds to nearest, ties to even.
template <typename S>
__device__ __forceinline__ S from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Note [Vectors]: a thread works on four neighbouring elements: 16 bytes of float32, 8 of a 16-bit type. The moments
// are float32 whatever the parameters are, so most bytes move in 16-byte accesses, and the 32 threads of a warp touch
// one gapless run of every stream. (Eight elements per thread would make the 16-bit accesses wider, but split each
// float32 one in two with gaps between threads.)
constexpr int kVector = 4;

template <typename S, int kCount = kVector>
struct alignas(kCount * sizeof(S)) Vector {
  S element[kCount];
};

// Where the emulation counts traffic; nothing in a build.
#ifndef CLARA_COUNT_LOAD
#define CLARA_COUNT_LOAD(bytes)
#define CLARA_COUNT_STORE(bytes)
#endif

// The addresses of a list are read from memory; the compiler cannot know that they do not lead to shared memory.
template <typename T>
__device__ __forceinline__ T load_global(const T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  CLARA_COUNT_LOAD(sizeof(T));
  return *pointer;
}
template <typename T>
__device__ __forceinline__ void store_global(T* pointer, const T& value) {
  __builtin_assume(__isGlobal(pointer));
  CLARA_COUNT_STORE(sizeof(T));
  *pointer = value;
}

// How a thread reaches its elements.
enum class Access {
  kAligned,  // four, every stream is aligned
  kMixed,    // four, each stream as its own alignment allows
  kSingle,   // one
};

template <Access kAccess>
constexpr int kElements = kAccess == Access::kSingle ? 1 : kVector;

// One stream of a block: storage of type S, of which this block has the elements of its chunk.
template <typename S>
struct Stream {
  S* data;

  __device__ __forceinline__ bool exists() const { return data != nullptr; }
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % alignof(Vector<S>) == 0;
  }

  template <Access kAccess>
  __device__ __forceinline__ Vector<S, kElements<kAccess>> load(int first) const {
    using Values = Vector<S, kElements<kAccess>>;
    Values values;
    if (kAccess == Access::kMixed && !aligned()) {
#pragma unroll
      for (int i = 0; i < kElements<kAccess>; ++i) values.element[i] = load_global(data + first + i);
    } else {
      values = load_global(reinterpret_cast<const Values*>(data + first));
    }
    return values;
  }

  template <Access kAccess>
  __device__ __forceinline__ void store(int first, const Vector<S, kElements<kAccess>>& values) const {
    if (kAccess == Access::kMixed && !aligned()) {
#pragma unroll
      for (int i = 0; i < kElements<kAccess>; ++i) store_global(data + first + i, values.element[i]);
    } else {
      store_global(reinterpret_cast<Vector<S, kElements<kAccess>>*>(data + first), values);
    }
  }
};

// A tensor's stream at one of its chunks; null stays null.
template <typename S>
__device__ __forceinline__ Stream<S> stream_at(const void* tensor, int64_t first_element) {
  return {tensor == nullptr ? nullptr : static_cast<S*>(const_cast<void*>(tensor)) + first_element};
}

}  // namespace clara::cuda
