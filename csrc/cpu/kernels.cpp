// The loops over the elements of a chunk. Compiled once per instruction set (CLARA_CPU_ISA names it).
//
// What is the same for a whole chunk (amsgrad, coupled decay, whether anything moves) is asked at every vector: the
// branches are always predicted, and one loop serves them all.
#include "kernels.h"

#include <algorithm>
#include <type_traits>

#include "cpu_backend.h"
#include "storage.h"

namespace clara::cpu::CLARA_CPU_ISA {
namespace {

constexpr int64_t kCacheLine = 64;

// How far ahead of the arithmetic the memory is asked for. The hardware's own prefetching stops at every page, and
// with four streams or more at once that shows. Of a sample, whose pieces lie up to a page apart, it sees nothing at all.
constexpr int64_t kPrefetchLines = 16;
constexpr int64_t kPrefetchSampled = 192;  // elements of a sample

template <typename T>
constexpr int64_t kElementsPerLine = kCacheLine / static_cast<int64_t>(sizeof(T));

// The streams of a chunk: a tensor's, from an element and its path on.
template <typename T, typename Param, typename Grad>
struct Streams {
  Param* param;
  const Grad* grad;
  T* m;
  T* v;
  T* v_max;  // null without amsgrad
  T* path;

  Streams(const TensorRecord& tensor, const void* gradient, int64_t first, int64_t path_first)
      : param(static_cast<Param*>(tensor.param) + first),
        grad(static_cast<const Grad*>(gradient) + first),
        m(static_cast<T*>(tensor.exp_avg) + first),
        v(static_cast<T*>(tensor.exp_avg_sq) + first),
        v_max(tensor.max_exp_avg_sq == nullptr ? nullptr : static_cast<T*>(tensor.max_exp_avg_sq) + first),
        path(static_cast<T*>(tensor.path) + path_first) {}

  void prefetch(int64_t i, bool with_param) const {
    __builtin_prefetch(grad + i);
    __builtin_prefetch(m + i);
    __builtin_prefetch(v + i);
    if (with_param) __builtin_prefetch(param + i);
    if (v_max != nullptr) __builtin_prefetch(v_max + i);
  }
};

// Not inlined: together with what makes their coefficients, the compiler may fuse multiplications with additions (FMA) in
// one copy of a loop and not in another, and the last bits would depend on where an element lies.
template <typename T>
[[gnu::noinline]] MeasureCoefficients<T> coefficients_of_measure(const TensorList& list, const TensorRecord& tensor) {
  return measure_coefficients<T>(list.groups[tensor.group], static_cast<T>(*tensor.step) + T(1), list.grad_scale,
                                 walk_of(tensor).moment_sq);
}

template <typename T>
[[gnu::noinline]] UpdateCoefficients<T> coefficients_of_update(const TensorList& list, const TensorRecord& tensor) {
  return update_coefficients<T>(list.groups[tensor.group], static_cast<T>(*tensor.step), list.grad_scale,
                                *tensor.lr_scale);
}

// Elements that do not fill a vector, or do not lie side by side, go through copies of a whole vector: every element
// meets the same instructions wherever it lies. Lanes without an element hold zeros.
template <typename T, typename Storage>
struct Copy {
  Storage elements[kLanes<T>] = {};

  void take(const Storage* from, int64_t count) {
    std::memcpy(elements, from, static_cast<size_t>(count) * sizeof(Storage));
  }
  // From pieces of `kept` elements, fewer than a vector has, in runs of `run`.
  void take(const Storage* from, int64_t count, int64_t kept, int64_t run) {
    if (kept == 1) take_pieces<1>(from, count, run);
    if (kept == 2) take_pieces<2>(from, count, run);
    if (kept == 4) take_pieces<4>(from, count, run);
    if (kept == 8) take_pieces<8>(from, count, run);
  }
  void give(Storage* to, int64_t count) const {
    std::memcpy(to, elements, static_cast<size_t>(count) * sizeof(Storage));
  }

 private:
  // Of a constant size, so that a piece is one move.
  template <int size>
  void take_pieces(const Storage* from, int64_t count, int64_t run) {
    if constexpr (size < kLanes<T>) {
      for (int64_t i = 0; i < count; i += size, from += run) std::memcpy(elements + i, from, size * sizeof(Storage));
    }
  }
};

// What one vector needs of all streams, filled by take(stream, copy).
template <typename T, typename Param, typename Grad>
struct Copies {
  Copy<T, Param> param;
  Copy<T, Grad> grad;
  Copy<T, T> m, v, v_max;
  Streams<T, Param, Grad> streams;  // the copies instead of the tensor's

  template <typename Take>
  Copies(const Streams<T, Param, Grad>& s, bool with_param, Take take) : streams(s) {
    if (with_param) take(s.param, param);
    take(s.grad, grad);
    take(s.m, m);
    take(s.v, v);
    streams.param = param.elements;
    streams.grad = grad.elements;
    streams.m = m.elements;
    streams.v = v.elements;
    if (s.v_max == nullptr) return;
    take(s.v_max, v_max);
    streams.v_max = v_max.elements;
  }
};

// ---------------------------------------------------------------------------------------------------------------
// Measure
// ---------------------------------------------------------------------------------------------------------------

// A sum over a chunk in two levels: lanes that took in the whole chunk one by one would be off by 1e-5 where the terms
// are alike, as they are at a first step.
template <typename T>
struct Sums {
  static constexpr int64_t kBlock = 16 * kElementsPerLine<T>;

  ElementSums<Vector<T>> block{}, blocks{};

  inline void end_block() {
    add(blocks, block);
    block = ElementSums<Vector<T>>{};
  }
  inline ElementSums<double> totals() {
    end_block();
    ElementSums<double> totals{};
    for (int i = 0; i < kSums; ++i) {
      for (int lane = 0; lane < kLanes<T>; ++lane) totals.columns[i] += static_cast<double>(blocks.columns[i][lane]);
    }
    return totals;
  }
};

// One vector of elements at index i whose path is at index p.
template <typename T, typename Param, typename Grad>
inline ElementSums<Vector<T>> measure_vector(const Streams<T, Param, Grad>& s, int64_t i, int64_t p,
                                             const MeasureCoefficients<T>& c) {
  using V = Vector<T>;
  V param{};
  if (c.adam.coupled_decay != T(0)) param = load(s.param + i);
  const V grad = effective_gradient(load(s.grad + i), param, c.adam);
  const V m_before = load(s.m + i), m = first_moment(m_before, grad, c.adam);
  V v_before = load(s.v + i), v = second_moment(v_before, grad, c.adam);
  if (s.v_max != nullptr) v_before = load(s.v_max + i), v = running_maximum(v_before, v);
  const V d = denominator(v, c.adam), d_before = denominator(v_before, c.adam);
  const V step = adam_step(m, d, c.adam);
  const V path_before = load(s.path + p);
  V path = path_before;
  if (c.moves) {
    path = extended_path(path_before, step, c);
    store(path, s.path + p);
  }
  return element_sums(path_before, path, m_before, m, grad, d_before, d, c);
}

// The same for less than a vector, or for pieces shorter than one.
template <typename T, typename Param, typename Grad>
inline ElementSums<Vector<T>> measure_copies(const Streams<T, Param, Grad>& s, int64_t i, int64_t p, int64_t count,
                                             int64_t kept, int64_t run, const MeasureCoefficients<T>& c) {
  Copies<T, Param, Grad> copies(s, c.adam.coupled_decay != T(0), [&](const auto* from, auto& to) {
    kept < count ? to.take(from + i, count, kept, run) : to.take(from + i, count);
  });
  Copy<T, T> path;  // of less than a vector: the path lies side by side
  const bool is_full = count == kLanes<T>;
  if (!is_full) path.take(s.path + p, count);
  copies.streams.path = is_full ? s.path + p : path.elements;
  // Called in one place: in two inlined copies the compiler may fuse different operations, and their last bits differ.
  ElementSums<Vector<T>> sums = measure_vector(copies.streams, 0, 0, c);
  if (is_full) return sums;
  if (c.moves) path.give(s.path + p, count);
  // Not what empty lanes have come to: without eps they hold 0 / 0.
  for (Vector<T>& column : sums.columns) {
    for (int64_t lane = count; lane < kLanes<T>; ++lane) column[lane] = T(0);
  }
  return sums;
}

template <typename T, typename Param, typename Grad>
ElementSums<double> measure_chunk(const TensorList& list, int64_t tensor, int64_t chunk) {
  const TensorRecord& record = list.tensors[tensor];
  const MeasureCoefficients<T> c = coefficients_of_measure<T>(list, record);
  const int64_t path_first = chunk * kPathChunk, count = std::min(kPathChunk, path_numel(record) - path_first);
  const int64_t first = path_first / record.kept * record.run;  // a chunk starts where a piece does
  const Streams<T, Param, Grad> s(record, list.grads[tensor], first, path_first);
  const bool whole = record.kept == record.run;  // one piece
  const int64_t kept = whole ? count : record.kept, run = whole ? count : record.run;
  const int64_t ahead =
      whole ? kPrefetchLines * kElementsPerLine<T> : std::max<int64_t>(1, kPrefetchSampled / kept) * run;
  Sums<T> sums;
  int64_t p = 0;
  if (kept >= kLanes<T>) {
    for (int64_t piece = 0; p + kLanes<T> <= count; piece += run) {
      for (int64_t i = piece; i + kLanes<T> <= piece + kept; i += kLanes<T>, p += kLanes<T>) {
        if (p % Sums<T>::kBlock == 0) sums.end_block();
        if ((i - piece) % kElementsPerLine<T> == 0) s.prefetch(i + ahead, c.adam.coupled_decay != T(0));
        add(sums.block, measure_vector(s, i, p, c));
      }
    }
  }
  for (; p < count; p += kLanes<T>) {
    if (p % Sums<T>::kBlock == 0) sums.end_block();
    const int64_t i = p / kept * run + p % kept;
    for (int64_t piece = 0; piece < kLanes<T> && !whole; piece += kept) {
      s.prefetch(i + ahead + piece / kept * run, c.adam.coupled_decay != T(0));
    }
    add(sums.block, measure_copies(s, i, p, std::min<int64_t>(kLanes<T>, count - p), kept, run, c));
  }
  return sums.totals();
}

// ---------------------------------------------------------------------------------------------------------------
// Update
// ---------------------------------------------------------------------------------------------------------------

template <typename T, typename Param, typename Grad>
inline void update_vector(const Streams<T, Param, Grad>& s, int64_t i, const UpdateCoefficients<T>& c) {
  using V = Vector<T>;
  const V param = load(s.param + i);
  const V grad = effective_gradient(load(s.grad + i), param, c.adam);
  const V m = first_moment(load(s.m + i), grad, c.adam);
  V v = second_moment(load(s.v + i), grad, c.adam);
  store(m, s.m + i);
  store(v, s.v + i);
  if (s.v_max != nullptr) {
    v = running_maximum(load(s.v_max + i), v);
    store(v, s.v_max + i);
  }
  const V step = adam_step(m, denominator(v, c.adam), c.adam);
  store(updated_parameter(param, step, c), s.param + i);
}

template <typename T, typename Param, typename Grad>
void update_chunk(const TensorList& list, int64_t tensor, int64_t chunk) {
  constexpr int64_t kLine = kElementsPerLine<T>;
  const TensorRecord& record = list.tensors[tensor];
  const UpdateCoefficients<T> c = coefficients_of_update<T>(list, record);
  const int64_t first = chunk * kChunk, count = std::min(kChunk, record.numel - first);
  const Streams<T, Param, Grad> s(record, list.grads[tensor], first, 0);
  int64_t i = 0;
  for (; i + kLine <= count; i += kLine) {
    s.prefetch(i + kPrefetchLines * kLine, true);
    for (int64_t j = i; j < i + kLine; j += kLanes<T>) update_vector(s, j, c);
  }
  for (; i + kLanes<T> <= count; i += kLanes<T>) update_vector(s, i, c);
  if (const int64_t rest = count - i; rest > 0) {
    Copies<T, Param, Grad> copies(s, true, [&](const auto* from, auto& to) { to.take(from + i, rest); });
    update_vector(copies.streams, 0, c);
    copies.param.give(s.param + i, rest);
    copies.m.give(s.m + i, rest);
    copies.v.give(s.v + i, rest);
    if (s.v_max != nullptr) copies.v_max.give(s.v_max + i, rest);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// From runtime dtypes to one of the loops above
// ---------------------------------------------------------------------------------------------------------------

template <typename T, typename Param, typename Grad>
constexpr Loops kLoops = {measure_chunk<T, Param, Grad>, update_chunk<T, Param, Grad>};

Loops find_loops(DType param, DType grad) {
  const auto are = [&](DType p, DType g) { return param == p && grad == g; };
  if (are(DType::kFloat32, DType::kFloat32)) return kLoops<float, float, float>;
  if (are(DType::kFloat32, DType::kBFloat16)) return kLoops<float, float, BFloat16>;
  if (are(DType::kFloat32, DType::kFloat16)) return kLoops<float, float, Float16>;
  if (are(DType::kBFloat16, DType::kBFloat16)) return kLoops<float, BFloat16, BFloat16>;
  if (are(DType::kBFloat16, DType::kFloat32)) return kLoops<float, BFloat16, float>;
  if (are(DType::kFloat16, DType::kFloat16)) return kLoops<float, Float16, Float16>;
  if (are(DType::kFloat16, DType::kFloat32)) return kLoops<float, Float16, float>;
  if (are(DType::kFloat64, DType::kFloat64)) return kLoops<double, double, double>;
  return {};
}

#define CLARA_STRING_(x) #x
#define CLARA_STRING(x) CLARA_STRING_(x)

}  // namespace

const Kernels kKernels = {CLARA_STRING(CLARA_CPU_ISA), find_loops};

}  // namespace clara::cpu::CLARA_CPU_ISA
