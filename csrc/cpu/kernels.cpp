// The loops over the elements of a chunk. Compiled once per instruction set (CLARA_CPU_ISA names it).
#include "kernels.h"

#include <type_traits>

#include "storage.h"

namespace clara {
namespace cpu {
namespace CLARA_CPU_ISA {
namespace {

constexpr int64_t kCacheLine = 64;

// How far ahead of the arithmetic the memory is asked for. The hardware's own prefetching stops at every page, and
// with up to six streams at once that shows.
constexpr int64_t kPrefetchLines = 16;

// The element loops advance by one cache line of the arithmetic type.
template <typename T>
constexpr int64_t kElementsPerLine = kCacheLine / static_cast<int64_t>(sizeof(T));

template <typename T, typename Storage>
inline void prefetch(const Storage* at, int64_t lines_ahead) {
  __builtin_prefetch(at + lines_ahead * kElementsPerLine<T>);
}

// The streams of a chunk.
template <typename T, typename Param, typename Grad, typename Path>
struct Streams {
  Param* param;
  const Grad* grad;
  T* m;
  T* v;
  T* v_max;
  Path* path;
  T* direction;  // null: not kept
  bool direction_is_cached;

  explicit Streams(const Chunk& chunk)
      : param(static_cast<Param*>(chunk.param)),
        grad(static_cast<const Grad*>(chunk.grad)),
        m(static_cast<T*>(chunk.exp_avg)),
        v(static_cast<T*>(chunk.exp_avg_sq)),
        v_max(static_cast<T*>(chunk.max_exp_avg_sq)),
        path(static_cast<Path*>(chunk.path)),
        direction(static_cast<T*>(chunk.direction)),
        direction_is_cached(chunk.direction_is_cached) {}
};

// The last elements of a chunk, less than a vector, go through a padded copy: every element meets the same
// instructions wherever it lies.
template <typename T, typename Storage>
class PaddedCopy {
 public:
  PaddedCopy(Storage* source, int64_t count, T padding) : source_(source), bytes_(count * sizeof(Storage)) {
    Stored<typename VectorOf<T>::type>::store(typename VectorOf<T>::type{} + padding, elements);
    std::memcpy(elements, source, bytes_);
  }
  void write_back() { std::memcpy(source_, elements, bytes_); }

  std::remove_const_t<Storage> elements[kLanes<T>];

 private:
  Storage* source_;
  size_t bytes_;
};

// ---------------------------------------------------------------------------------------------------------------
// Measure
// ---------------------------------------------------------------------------------------------------------------

// A sum over a chunk in two levels: lanes that took in the whole chunk one by one would be off by 1e-5 where the terms
// are alike, as they are at a first step.
template <typename T>
struct LaneSums {
  using V = typename VectorOf<T>::type;
  static constexpr int64_t kBlock = 16 * kElementsPerLine<T>;

  V block{}, blocks{};

  inline void end_block() {
    blocks += block;
    block = V{};
  }
  inline double total() {
    end_block();
    double sum = 0.0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(blocks[lane]);
    return sum;
  }
};

template <typename T>
struct ChunkSums {
  LaneSums<T> path_sq;  // of the path as stored
  LaneSums<T> step_sq;
};

// One vector of elements at index i.
template <typename T, MeasureMode mode, bool amsgrad, typename Streams>
inline void measure_vector(const Streams& s, int64_t i, const MeasureCoefficients<T>& c,
                           const ApplyCoefficients<T>& a, ChunkSums<T>& sums) {
  using V = typename VectorOf<T>::type;
  using S = Stored<V>;
  V param{};
  if constexpr (mode != MeasureMode::kPlain) param = S::load(s.param + i);
  V grad = S::load(s.grad + i);
  grad = mode == MeasureMode::kPlain ? grad * c.grad_factor : effective_gradient(grad, param, c);
  const V m = first_moment(S::load(s.m + i), grad, c);
  V v = second_moment(S::load(s.v + i), grad, c);
  S::store(m, s.m + i);
  S::store(v, s.v + i);
  if constexpr (amsgrad) {
    v = running_maximum(S::load(s.v_max + i), v);
    S::store(v, s.v_max + i);
  }
  const V direction = adam_direction(m, v, c.direction);
  if constexpr (mode != MeasureMode::kApply) {
    if (s.direction != nullptr) {
      if (s.direction_is_cached) {
        S::store(direction, s.direction + i);
      } else {
        stream(direction, s.direction + i);
      }
    }
  }
  S::store(extended_path(S::load(s.path + i), direction, c), s.path + i);
  const V stored_path = S::load(s.path + i);
  sums.path_sq.block += stored_path * stored_path;
  sums.step_sq.block += direction * direction;
  if constexpr (mode == MeasureMode::kApply) S::store(updated_parameter(param, direction, a), s.param + i);
}

template <typename T, typename Param, typename Grad, typename Path, MeasureMode mode, bool amsgrad>
PartialSums<double> measure_chunk(const Chunk& chunk, const void* measure_coefficients,
                                  const void* apply_coefficients) {
  constexpr int64_t kStep = kElementsPerLine<T>;
  // Copies: the compiler must not fear that a store into a tensor changes them.
  const auto c = *static_cast<const MeasureCoefficients<T>*>(measure_coefficients);
  const auto a = mode == MeasureMode::kApply ? *static_cast<const ApplyCoefficients<T>*>(apply_coefficients)
                                             : ApplyCoefficients<T>{};
  const Streams<T, Param, Grad, Path> s(chunk);
  ChunkSums<T> sums;
  int64_t i = 0;
  for (; i + kStep <= chunk.numel; i += kStep) {
    if (i % LaneSums<T>::kBlock == 0) {
      sums.path_sq.end_block();
      sums.step_sq.end_block();
    }
    prefetch<T>(s.grad + i, kPrefetchLines);
    prefetch<T>(s.m + i, kPrefetchLines);
    prefetch<T>(s.v + i, kPrefetchLines);
    prefetch<T>(s.path + i, kPrefetchLines);
    if constexpr (mode != MeasureMode::kPlain) prefetch<T>(s.param + i, kPrefetchLines);
    if constexpr (amsgrad) prefetch<T>(s.v_max + i, kPrefetchLines);
    for (int64_t j = i; j < i + kStep; j += kLanes<T>) measure_vector<T, mode, amsgrad>(s, j, c, a, sums);
  }
  for (; i + kLanes<T> <= chunk.numel; i += kLanes<T>) measure_vector<T, mode, amsgrad>(s, i, c, a, sums);
  if (const int64_t rest = chunk.numel - i; rest > 0) {
    // Padding of v = 1 and everything else = 0 makes a step and a path of exactly 0, also with eps = 0.
    Streams<T, Param, Grad, Path> padded = s;
    Grad grad[kLanes<T>] = {};
    std::memcpy(grad, s.grad + i, static_cast<size_t>(rest) * sizeof(Grad));
    PaddedCopy<T, T> m(s.m + i, rest, T(0)), v(s.v + i, rest, T(1));
    PaddedCopy<T, T> v_max(amsgrad ? s.v_max + i : s.v + i, rest, T(1));
    PaddedCopy<T, Path> path(s.path + i, rest, T(0));
    padded.grad = grad;
    padded.m = m.elements;
    padded.v = v.elements;
    padded.v_max = v_max.elements;
    padded.path = path.elements;
    if (s.direction != nullptr) padded.direction = s.direction + i;  // there is room for a whole chunk
    if constexpr (mode == MeasureMode::kPlain) {
      measure_vector<T, mode, amsgrad>(padded, 0, c, a, sums);
    } else {
      PaddedCopy<T, Param> param(s.param + i, rest, T(0));
      padded.param = param.elements;
      measure_vector<T, mode, amsgrad>(padded, 0, c, a, sums);
      if constexpr (mode == MeasureMode::kApply) param.write_back();
    }
    m.write_back();
    v.write_back();
    if constexpr (amsgrad) v_max.write_back();
    path.write_back();
  }
  if (s.direction != nullptr && !s.direction_is_cached) end_streaming();
  return {sums.path_sq.total(), sums.step_sq.total()};
}

// ---------------------------------------------------------------------------------------------------------------
// Apply
// ---------------------------------------------------------------------------------------------------------------

// Adam's step, computed anew from the moments.
template <typename T>
struct DirectionOfMoments {
  using V = typename VectorOf<T>::type;
  const T* m;
  const T* v;

  void prefetch_before(int64_t i) const {
    prefetch<T>(m + i, -kPrefetchLines);
    prefetch<T>(v + i, -kPrefetchLines);
  }
  V at(int64_t i, const ApplyCoefficients<T>& a) const {
    return adam_direction(Stored<V>::load(m + i), Stored<V>::load(v + i), a.direction);
  }
  V rest_at(int64_t i, int64_t count, const ApplyCoefficients<T>& a) const {
    const PaddedCopy<T, const T> m_rest(m + i, count, T(0)), v_rest(v + i, count, T(1));
    return DirectionOfMoments{m_rest.elements, v_rest.elements}.at(0, a);
  }
};

// Adam's step as measure left it: the same bits.
template <typename T>
struct KeptDirection {
  using V = typename VectorOf<T>::type;
  const T* direction;

  void prefetch_before(int64_t i) const { prefetch<T>(direction + i, -kPrefetchLines); }
  V at(int64_t i, const ApplyCoefficients<T>&) const { return Stored<V>::load(direction + i); }
  V rest_at(int64_t i, int64_t, const ApplyCoefficients<T>& a) const { return at(i, a); }
};

template <typename T, typename Param>
inline void apply_vector(Param* param, typename VectorOf<T>::type direction, const ApplyCoefficients<T>& a) {
  using S = Stored<typename VectorOf<T>::type>;
  S::store(updated_parameter(S::load(param), direction, a), param);
}

template <typename T, typename Param, typename Direction>
inline void apply_directions(Param* param, int64_t numel, const Direction direction, const ApplyCoefficients<T> a) {
  constexpr int64_t kStep = kElementsPerLine<T>;
  const auto vectors = [&](int64_t first, int64_t last) {
    for (int64_t i = last - kLanes<T>; i >= first; i -= kLanes<T>) apply_vector<T>(param + i, direction.at(i, a), a);
  };
  const auto line = [&](int64_t i) {
    prefetch<T>(param + i, -kPrefetchLines);
    direction.prefetch_before(i);
    vectors(i, i + kStep);
  };
  // Backwards: the tail is what measure left in the cache.
  int64_t end = numel;
  if (const int64_t rest = end % kLanes<T>; rest > 0) {
    end -= rest;
    PaddedCopy<T, Param> param_rest(param + end, rest, T(0));
    apply_vector<T>(param_rest.elements, direction.rest_at(end, rest, a), a);
    param_rest.write_back();
  }
  // Both halves at once: two or three streams alone leave the memory idle at times.
  const int64_t half = end / (2 * kStep) * kStep;
  vectors(2 * half, end);
  for (int64_t i = half - kStep; i >= 0; i -= kStep) {
    line(half + i);
    line(i);
  }
}

template <typename T, typename Param>
void apply_chunk(const Chunk& chunk, const void* apply_coefficients) {
  const auto a = *static_cast<const ApplyCoefficients<T>*>(apply_coefficients);
  Param* param = static_cast<Param*>(chunk.param);
  if (chunk.direction != nullptr) {
    apply_directions<T>(param, chunk.numel, KeptDirection<T>{static_cast<const T*>(chunk.direction)}, a);
    return;
  }
  const void* v = chunk.max_exp_avg_sq != nullptr ? chunk.max_exp_avg_sq : chunk.exp_avg_sq;
  const DirectionOfMoments<T> direction{static_cast<const T*>(chunk.exp_avg), static_cast<const T*>(v)};
  apply_directions<T>(param, chunk.numel, direction, a);
}

// ---------------------------------------------------------------------------------------------------------------
// From runtime dtypes to one of the loops above
// ---------------------------------------------------------------------------------------------------------------

template <typename T, typename Param, typename Grad, typename Path>
MeasureChunk measure_for_mode(MeasureMode mode, bool amsgrad) {
  switch (mode) {
    case MeasureMode::kPlain:
      // Does not touch the parameter, so one loop serves all its storage types.
      return amsgrad ? measure_chunk<T, T, Grad, Path, MeasureMode::kPlain, true>
                     : measure_chunk<T, T, Grad, Path, MeasureMode::kPlain, false>;
    case MeasureMode::kCoupled:
      return amsgrad ? measure_chunk<T, Param, Grad, Path, MeasureMode::kCoupled, true>
                     : measure_chunk<T, Param, Grad, Path, MeasureMode::kCoupled, false>;
    case MeasureMode::kApply:
      return amsgrad ? measure_chunk<T, Param, Grad, Path, MeasureMode::kApply, true>
                     : measure_chunk<T, Param, Grad, Path, MeasureMode::kApply, false>;
  }
  return nullptr;
}

template <typename T, typename Param, typename Grad>
MeasureChunk measure_for_path(DType path, MeasureMode mode, bool amsgrad) {
  if (path == DType::kFloat32) return measure_for_mode<T, Param, Grad, float>(mode, amsgrad);
  if (path == DType::kBFloat16) return measure_for_mode<T, Param, Grad, BFloat16>(mode, amsgrad);
  return nullptr;
}

MeasureChunk find_measure(DType param, DType grad, DType path, MeasureMode mode, bool amsgrad) {
  switch (param) {
    case DType::kFloat32:
      if (grad == DType::kFloat32) return measure_for_path<float, float, float>(path, mode, amsgrad);
      if (grad == DType::kBFloat16) return measure_for_path<float, float, BFloat16>(path, mode, amsgrad);
      if (grad == DType::kFloat16) return measure_for_path<float, float, Float16>(path, mode, amsgrad);
      return nullptr;
    case DType::kBFloat16:
      if (grad == DType::kBFloat16) return measure_for_path<float, BFloat16, BFloat16>(path, mode, amsgrad);
      if (grad == DType::kFloat32) return measure_for_path<float, BFloat16, float>(path, mode, amsgrad);
      return nullptr;
    case DType::kFloat16:
      if (grad == DType::kFloat16) return measure_for_path<float, Float16, Float16>(path, mode, amsgrad);
      if (grad == DType::kFloat32) return measure_for_path<float, Float16, float>(path, mode, amsgrad);
      return nullptr;
    case DType::kFloat64:
      if (grad != DType::kFloat64) return nullptr;
      if (path == DType::kFloat64) return measure_for_mode<double, double, double, double>(mode, amsgrad);
      return measure_for_path<double, double, double>(path, mode, amsgrad);
  }
  return nullptr;
}

ApplyChunk find_apply(DType param) {
  switch (param) {
    case DType::kFloat32: return apply_chunk<float, float>;
    case DType::kBFloat16: return apply_chunk<float, BFloat16>;
    case DType::kFloat16: return apply_chunk<float, Float16>;
    case DType::kFloat64: return apply_chunk<double, double>;
  }
  return nullptr;
}

#define CLARA_STRING_(x) #x
#define CLARA_STRING(x) CLARA_STRING_(x)

}  // namespace

const Kernels kKernels = {CLARA_STRING(CLARA_CPU_ISA), find_measure, find_apply};

}  // namespace CLARA_CPU_ISA
}  // namespace cpu
}  // namespace clara
