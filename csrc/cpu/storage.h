// Vectors of the arithmetic type, one register of the instruction set wide, and how stored elements become vectors and
// back. Rounding is to nearest even; NaN stays NaN (quiet); a float16 overflows to infinity.
//
// The vectors are the compiler's own (GCC and Clang): arithmetic, comparison and ?: work on them lane by lane.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../tensor_list.h"

#if defined(__AVX512F__)
#define CLARA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define CLARA_VECTOR_BYTES 32
#else
#define CLARA_VECTOR_BYTES 16
#endif

namespace clara {
namespace cpu {
// Internal linkage, as in adam_clara.h: this file is compiled once per instruction set.
namespace {

typedef float FloatVector __attribute__((vector_size(CLARA_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(CLARA_VECTOR_BYTES)));
typedef uint32_t BitsVector __attribute__((vector_size(CLARA_VECTOR_BYTES)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(CLARA_VECTOR_BYTES / 2)));

template <typename T>
using Vector = std::conditional_t<std::is_same_v<T, double>, DoubleVector, FloatVector>;

template <typename T>
constexpr int kLanes = CLARA_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename To, typename From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "reinterpretation between types of different size");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

template <typename V, typename Storage>
inline V read_as(const Storage* from) {
  V value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename V, typename Storage>
inline void write_as(V value, Storage* to) {
  std::memcpy(to, &value, sizeof(value));
}

// ---------------------------------------------------------------------------------------------------------------
// Conversions of one vector
// ---------------------------------------------------------------------------------------------------------------

inline FloatVector widened_bfloat16(HalfBitsVector bits) {
  return bits_as<FloatVector>(__builtin_convertvector(bits, BitsVector) << 16);
}

inline HalfBitsVector rounded_to_bfloat16(FloatVector value) {
  const BitsVector bits = bits_as<BitsVector>(value);
  const BitsVector to_nearest_even = 0x7FFFu + ((bits >> 16) & 1u);
  const BitsVector quiet_nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(value == value ? (bits + to_nearest_even) >> 16 : quiet_nan, HalfBitsVector);
}

inline FloatVector widened_float16(HalfBitsVector half) {
#if defined(__AVX512F__)
  return bits_as<FloatVector>(_mm512_maskz_cvtph_ps(0xFFFF, bits_as<__m256i>(half)));
#elif defined(__F16C__)
  return bits_as<FloatVector>(_mm256_cvtph_ps(bits_as<__m128i>(half)));
#else
  const BitsVector bits = __builtin_convertvector(half, BitsVector);
  const BitsVector sign = (bits & 0x8000u) << 16;
  const BitsVector magnitude = (bits & 0x7FFFu) << 13;
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal.
  const FloatVector finite = bits_as<FloatVector>(magnitude) * bits_as<float>(0x77800000u);
  const BitsVector special = magnitude | 0x7F800000u;
  return bits_as<FloatVector>(sign | (magnitude >= (0x7C00u << 13) ? special : bits_as<BitsVector>(finite)));
#endif
}

inline HalfBitsVector rounded_to_float16(FloatVector value) {
#if defined(__AVX512F__)
  // With a mask of all lanes: GCC 12 warns of undefined operands inside the unmasked form.
  return bits_as<HalfBitsVector>(_mm512_maskz_cvtps_ph(0xFFFF, bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits_as<HalfBitsVector>(_mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const BitsVector bits = bits_as<BitsVector>(value);
  const BitsVector sign = (bits >> 16) & 0x8000u;
  const BitsVector magnitude = bits & 0x7FFFFFFFu;
  const BitsVector normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the float unit round at 2^-24.
  const BitsVector subnormal = bits_as<BitsVector>(bits_as<FloatVector>(magnitude) + 0.5f) - 0x3F000000u;
  const BitsVector quiet_nan = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  BitsVector result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? bits_as<BitsVector>(BitsVector{} + 0x7C00u) : result;  // 65520 and above
  result = magnitude > 0x7F800000u ? quiet_nan : result;
  return __builtin_convertvector(sign | result, HalfBitsVector);
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// One vector of elements, of the arithmetic type of what is stored
// ---------------------------------------------------------------------------------------------------------------

inline FloatVector load(const float* from) { return read_as<FloatVector>(from); }
inline DoubleVector load(const double* from) { return read_as<DoubleVector>(from); }
inline FloatVector load(const BFloat16* from) { return widened_bfloat16(read_as<HalfBitsVector>(from)); }
inline FloatVector load(const Float16* from) { return widened_float16(read_as<HalfBitsVector>(from)); }

inline void store(FloatVector value, float* to) { write_as(value, to); }
inline void store(DoubleVector value, double* to) { write_as(value, to); }
inline void store(FloatVector value, BFloat16* to) { write_as(rounded_to_bfloat16(value), to); }
inline void store(FloatVector value, Float16* to) { write_as(rounded_to_float16(value), to); }

}  // namespace
}  // namespace cpu

template <>
inline cpu::FloatVector square_root(cpu::FloatVector v) {
#if defined(__AVX512F__)
  return cpu::bits_as<cpu::FloatVector>(_mm512_maskz_sqrt_ps(0xFFFF, cpu::bits_as<__m512>(v)));
#elif defined(__AVX2__)
  return cpu::bits_as<cpu::FloatVector>(_mm256_sqrt_ps(cpu::bits_as<__m256>(v)));
#elif defined(__SSE2__)
  return cpu::bits_as<cpu::FloatVector>(_mm_sqrt_ps(cpu::bits_as<__m128>(v)));
#else
  for (int i = 0; i < cpu::kLanes<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

template <>
inline cpu::DoubleVector square_root(cpu::DoubleVector v) {
#if defined(__AVX512F__)
  return cpu::bits_as<cpu::DoubleVector>(_mm512_maskz_sqrt_pd(0xFF, cpu::bits_as<__m512d>(v)));
#elif defined(__AVX2__)
  return cpu::bits_as<cpu::DoubleVector>(_mm256_sqrt_pd(cpu::bits_as<__m256d>(v)));
#elif defined(__SSE2__)
  return cpu::bits_as<cpu::DoubleVector>(_mm_sqrt_pd(cpu::bits_as<__m128d>(v)));
#else
  for (int i = 0; i < cpu::kLanes<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

}  // namespace clara
