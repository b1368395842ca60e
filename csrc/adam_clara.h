// The formulas of AdamClara, written once for host and device. No loops over tensors, no memory layout, no threads:
// CPU loops and CUDA kernels both call these functions, so a test of one back end tests the arithmetic of the other.
//
// Notation as in docs/algorithm.md: m, v moments; u Adam's step; path the decaying sum of steps; N its squared norm;
// kappa the expected path^2 of one element under pure noise; mu the learning-rate scale.
#pragma once

#include <cmath>
#include <cstdint>

// static: the CPU kernels are compiled once per instruction set. With external linkage the linker would keep one copy of
// a function that was not inlined, maybe the one with instructions that this processor lacks.
#if defined(__CUDACC__)
#define CLARA_HD static __host__ __device__ __forceinline__
#else
#define CLARA_HD static inline
#endif

namespace clara {

// ---------------------------------------------------------------------------------------------------------------
// Options of one param group, as the host reads them at every step. Doubles: rounding happens once, where the
// arithmetic type of a tensor is known.
// ---------------------------------------------------------------------------------------------------------------

// Where kappa_t comes from: `table[t-1]` for t <= length, then the geometric approach to the limit that is left once
// Adam's bias correction has died out. A fixed reference is a table of length 0 whose limit is that number. For a walk
// of measured steps see measured_walk_table.
struct ReferenceTable {
  const double* values;  // on the device of the tensors
  int64_t length;
  double limit;
  double log_tail_decay;  // log(q^2), -inf for smoothing 1
};

enum class ScaleRule : int32_t {
  kFactor,    // Global, Local: mu follows the factor at once
  kSmoothed,  // Smoothed: mu follows a moving average with weight lr_smoothing
};

// What the reference is counted in. It decides as well how the scale answers to the path; see path_excess.
enum class WalkUnit : int32_t {
  kElement,      // the tensor's elements: steps as long as pure noise makes them
  kStepSquared,  // the squares of the step just measured
};

struct GroupOptions {
  double lr;
  const void* lr_tensor;        // one element on the tensors' device; null: use lr
  int32_t lr_tensor_is_double;  // float64 instead of float32
  int32_t maximize;
  int32_t decoupled_weight_decay;
  int32_t accumulate;
  int32_t adapt_lr;
  ScaleRule scale_rule;
  WalkUnit walk_unit;
  int32_t reserved;
  double beta1, beta2;
  double log_beta1, log_beta2;  // natural logarithms, from the host in double; -inf for 0
  double eps;
  double weight_decay;
  double path_decay;  // q = 1 - smoothing
  double path_gain;   // s = sqrt(smoothing (2 - smoothing))
  double factor_gain;          // smoothing / (2 damping)
  double clip_low, clip_high;  // 0 and +inf for clip=None
  double lr_smoothing;
  double scale_low, scale_high;
  ReferenceTable reference;
};

// ---------------------------------------------------------------------------------------------------------------
// Scalars of one tensor in one step, rounded to its arithmetic type T (float, or double for float64 parameters).
// ---------------------------------------------------------------------------------------------------------------

// 1 - beta^t. expm1 keeps full relative accuracy in float, where 1 - powf(0.999f, 1) would have lost four digits.
template <typename T>
CLARA_HD T bias_correction(double log_beta, T step) {
  return -std::expm1(static_cast<T>(log_beta) * step);
}

template <typename T>
struct DirectionCoefficients {
  T inverse_bias1;
  T inverse_bias2;
  T eps;
};

template <typename T>
struct MeasureCoefficients {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T coupled_decay;
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T path_decay, path_gain;
  DirectionCoefficients<T> direction;
};

template <typename T>
struct ApplyCoefficients {
  T rate;  // lr * mu
  T decoupled_decay;
  DirectionCoefficients<T> direction;
};

// `step` counts from 1: the step being taken.
template <typename T>
CLARA_HD DirectionCoefficients<T> direction_coefficients(const GroupOptions& options, T step) {
  return {T(1) / bias_correction<T>(options.log_beta1, step), T(1) / bias_correction<T>(options.log_beta2, step),
          static_cast<T>(options.eps)};
}

template <typename T>
CLARA_HD MeasureCoefficients<T> measure_coefficients(const GroupOptions& options, T step, const float* grad_scale) {
  const T unscale = grad_scale == nullptr ? T(1) : T(1) / static_cast<T>(*grad_scale);
  return {options.maximize ? -unscale : unscale,
          static_cast<T>(options.decoupled_weight_decay ? 0.0 : options.weight_decay),
          static_cast<T>(options.beta1),
          static_cast<T>(1.0 - options.beta1),
          static_cast<T>(options.beta2),
          static_cast<T>(1.0 - options.beta2),
          static_cast<T>(options.path_decay),
          static_cast<T>(options.path_gain),
          direction_coefficients<T>(options, step)};
}

CLARA_HD double learning_rate(const GroupOptions& options) {
  if (options.lr_tensor == nullptr) return options.lr;
  return options.lr_tensor_is_double ? *static_cast<const double*>(options.lr_tensor)
                                     : static_cast<double>(*static_cast<const float*>(options.lr_tensor));
}

template <typename T>
CLARA_HD ApplyCoefficients<T> apply_coefficients(const GroupOptions& options, T step, float lr_scale) {
  return {static_cast<T>(learning_rate(options) * static_cast<double>(lr_scale)),
          static_cast<T>(options.decoupled_weight_decay ? options.weight_decay : 0.0),
          direction_coefficients<T>(options, step)};
}

// ---------------------------------------------------------------------------------------------------------------
// Element math. V is the arithmetic type T itself (CUDA threads) or a vector of T (CPU loops).
// ---------------------------------------------------------------------------------------------------------------

template <typename V>
CLARA_HD V square_root(V v) {
  return std::sqrt(v);
}

// Decay 0 is told apart so that an infinite parameter (a mask, say) does not turn into 0 * inf = NaN.
template <typename V, typename T>
CLARA_HD V with_decay(V step, T decay, V param) {
  return decay == T(0) ? step : step + decay * param;
}

template <typename V, typename T>
CLARA_HD V effective_gradient(V grad, V param, const MeasureCoefficients<T>& c) {
  return with_decay(grad * c.grad_factor, c.coupled_decay, param);
}

template <typename V, typename T>
CLARA_HD V first_moment(V m, V grad, const MeasureCoefficients<T>& c) {
  return c.beta1 * m + c.one_minus_beta1 * grad;
}

template <typename V, typename T>
CLARA_HD V second_moment(V v, V grad, const MeasureCoefficients<T>& c) {
  return c.beta2 * v + c.one_minus_beta2 * (grad * grad);
}

// Adam's step u. Under amsgrad the caller passes the running maximum as v.
template <typename V, typename T>
CLARA_HD V adam_direction(V m, V v, const DirectionCoefficients<T>& c) {
  return (m * c.inverse_bias1) / (square_root(v * c.inverse_bias2) + c.eps);
}

template <typename V, typename T>
CLARA_HD V extended_path(V path, V direction, const MeasureCoefficients<T>& c) {
  return c.path_decay * path + c.path_gain * direction;
}

template <typename V, typename T>
CLARA_HD V updated_parameter(V param, V direction, const ApplyCoefficients<T>& c) {
  return param - c.rate * with_decay(direction, c.decoupled_decay, param);
}

// Propagates NaN like torch.maximum, unlike fmax.
template <typename V>
CLARA_HD V running_maximum(V maximum, V v) {
  return maximum > v ? maximum : (maximum == maximum ? v : maximum);
}

// ---------------------------------------------------------------------------------------------------------------
// Adapt: a handful of scalars per tensor (Local, Smoothed) or per optimizer (Global)
// ---------------------------------------------------------------------------------------------------------------

// kappa_t, the expected path^2 of one element after `step` steps of pure noise.
CLARA_HD double random_walk_reference(const ReferenceTable& table, int64_t step) {
  if (table.length == 0) return table.limit;
  if (step <= table.length) return table.values[step - 1];
  const double excess = table.values[table.length - 1] - table.limit;
  return table.limit + excess * std::exp(static_cast<double>(step - table.length) * table.log_tail_decay);
}

// The number of the step that follows so many, as an index into tables. A count that is none (negative, infinite or
// NaN: a damaged checkpoint) must not lead outside of them; what becomes of the parameters then is for Adam's formulas
// to say.
CLARA_HD int64_t step_after(float steps_taken) {
  constexpr float kMost = 4e18f;  // an int64_t holds it
  if (!(steps_taken > 0.0f)) return 1;
  return static_cast<int64_t>(steps_taken < kMost ? steps_taken : kMost) + 1;
}

// What a walk in place of the path is expected to give for N.
CLARA_HD double expected_path_sq(const GroupOptions& options, int64_t step, int64_t numel, double step_sq) {
  const double kappa = random_walk_reference(options.reference, step);
  return kappa * (options.walk_unit == WalkUnit::kElement ? static_cast<double>(numel) : step_sq);
}

// Where the learning rate is right, batches still pull back what the last ones overdid: the path is then shorter than a
// walk of the measured steps, but longer than this share of it. docs/learning_rate.md has the measurements behind it.
constexpr double kRestingShare = 0.6;

// By how much the path is too long (or, negative, too short); its product with factor_gain is the logarithm of mu's
// factor. Counted in elements it is r - 1. Counted in measured steps it is relative to the path: at most 1 however long
// the path, without bound where the path is short, so that mu climbs slowly and falls fast. In between mu rests.
CLARA_HD double path_excess(double path_sq, double expected_path_sq, WalkUnit unit) {
  if (unit == WalkUnit::kElement) return path_sq / expected_path_sq - 1.0;
  const double walk = expected_path_sq / path_sq;
  if (walk < 1.0) return 1.0 - walk;
  return kRestingShare * walk > 1.0 ? 1.0 - kRestingShare * walk : 0.0;
}

// The next mu from the path's squared norm N and its expectation (sums over tensors under Global). mu stays when
// adaptation is off, when the ratio is not finite and when nothing has moved yet.
CLARA_HD float adapted_scale(float scale, double path_sq, double expected_path_sq, const GroupOptions& options) {
  const double ratio = path_sq / expected_path_sq;
  if (!options.adapt_lr || path_sq == 0.0 || !(std::fabs(ratio) <= 1.7976931348623157e308)) return scale;
  double factor = std::exp(options.factor_gain * path_excess(path_sq, expected_path_sq, options.walk_unit));
  factor = factor < options.clip_low ? options.clip_low : (factor > options.clip_high ? options.clip_high : factor);
  const double previous = static_cast<double>(scale);
  double next = options.accumulate ? previous * factor : factor;
  if (options.scale_rule == ScaleRule::kSmoothed) {
    next = options.lr_smoothing * previous + (1.0 - options.lr_smoothing) * next;
  }
  next = next < options.scale_low ? options.scale_low : (next > options.scale_high ? options.scale_high : next);
  return static_cast<float>(next);
}

// Note [Order-free sums]: AdamClaraGlobal adds the norms of all tensors. So that mu does not depend on the order of the
// parameters, not even in its last bit, the norms are added as integers: multiples of a unit that is chosen from the
// largest of them (a maximum does not depend on the order either) such that `count` of them cannot overflow. What is
// lost is below 2^-40 of the largest for a million tensors.
//
// The power of two that turns a value of at most `largest` into such an integer.
CLARA_HD double fixed_point_scale(double largest, int64_t count) {
  int exponent = 0;
  std::frexp(largest, &exponent);  // largest < 2^exponent
  int count_bits = 0;
  while ((int64_t(1) << count_bits) < count) ++count_bits;
  const int shift = 62 - count_bits - exponent;
  return std::ldexp(1.0, shift < 1000 ? shift : 1000);
}

CLARA_HD int64_t to_fixed_point(double value, double scale) { return static_cast<int64_t>(value * scale); }

CLARA_HD double from_fixed_point(int64_t sum, double scale) { return static_cast<double>(sum) / scale; }

}  // namespace clara
