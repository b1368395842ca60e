// The formulas of AdamClara, written once for host and device. No loops over tensors, no memory layout, no threads:
// CPU loops and CUDA kernels both call these functions, so a test of one back end tests the arithmetic of the other.
//
// Notation as in docs/algorithm.md: m, v moments; d the denominator of Adam's step u; g~ = g/d the gradient in units of
// its own size; path the decaying sum of steps; mu the learning-rate scale.
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
// Options of one param group, as the host reads them at every step. Doubles, flags as well (0 or 1): rounding happens
// once, where the arithmetic type of a tensor is known. Those that are listed are read by these names (options.py).
// ---------------------------------------------------------------------------------------------------------------

#define CLARA_GROUP_OPTIONS(X)                                                                                   \
  X(beta1) X(beta2)                                                                                              \
  X(eps) X(weight_decay) X(maximize) X(decoupled_weight_decay)                                                   \
  X(smoothing) X(damping)                                                                                        \
  X(reference) /* 0: the random walk; else what path^2 of one element is compared with */                        \
  X(clip_low) X(clip_high) /* 0 and +inf for clip=None */                                                        \
  X(lr_smoothing) X(scale_low) X(scale_high) X(adapt_lr)

struct GroupOptions {
#define CLARA_MEMBER(name) double name;
  CLARA_GROUP_OPTIONS(CLARA_MEMBER)
#undef CLARA_MEMBER
  double log_beta1, log_beta2;  // natural logarithms, -inf for 0
  double lr;
  const void* lr_tensor;        // one element on the tensors' device, in place of lr; null: lr it is
  int64_t lr_tensor_is_double;  // float64 instead of float32
};

CLARA_HD double learning_rate(const GroupOptions& options) {
  if (options.lr_tensor == nullptr) return options.lr;
  return options.lr_tensor_is_double ? *static_cast<const double*>(options.lr_tensor)
                                     : static_cast<double>(*static_cast<const float*>(options.lr_tensor));
}

// ---------------------------------------------------------------------------------------------------------------
// Coefficients of one tensor in one step, rounded to its arithmetic type T (float, or double for float64 parameters)
// ---------------------------------------------------------------------------------------------------------------

// 1 - beta^t. expm1 keeps full relative accuracy in float, where 1 - powf(0.999f, 1) would have lost four digits.
template <typename T>
CLARA_HD T bias_correction(double log_beta, T step) {
  return -std::expm1(static_cast<T>(log_beta) * step);
}

template <typename T>
struct AdamCoefficients {
  T grad_factor;  // 1 / grad_scale, negative to maximize
  T coupled_decay;
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T inverse_bias1;       // 1 / (1 - beta1^t)
  T inverse_root_bias2;  // 1 / sqrt(1 - beta2^t)
  T eps;
};

template <typename T>
struct MeasureCoefficients {
  AdamCoefficients<T> adam;
  T path_decay, path_gain;  // q, s
  T walk_moment_sq;         // V / W before this step; see WalkState
  bool moves;               // false where lr is 0: what does not move has no path and no vote
  bool in_adams_metric;     // each element counts with its d; otherwise (a fixed reference) all count alike
};

template <typename T>
struct UpdateCoefficients {
  AdamCoefficients<T> adam;
  T rate;  // lr * mu
  T decoupled_decay;
};

// `step` counts from 1: the step being taken.
template <typename T>
CLARA_HD AdamCoefficients<T> adam_coefficients(const GroupOptions& options, T step, const float* grad_scale) {
  const T unscale = grad_scale == nullptr ? T(1) : T(1) / static_cast<T>(*grad_scale);
  return {options.maximize != 0.0 ? -unscale : unscale,
          static_cast<T>(options.decoupled_weight_decay != 0.0 ? 0.0 : options.weight_decay),
          static_cast<T>(options.beta1),
          static_cast<T>(1.0 - options.beta1),
          static_cast<T>(options.beta2),
          static_cast<T>(1.0 - options.beta2),
          T(1) / bias_correction<T>(options.log_beta1, step),
          T(1) / std::sqrt(bias_correction<T>(options.log_beta2, step)),
          static_cast<T>(options.eps)};
}

// s: makes unit white noise keep a unit path.
CLARA_HD double path_gain(double smoothing) { return std::sqrt(smoothing * (2.0 - smoothing)); }

template <typename T>
CLARA_HD MeasureCoefficients<T> measure_coefficients(const GroupOptions& options, T step, const float* grad_scale,
                                                     float walk_moment_sq) {
  return {adam_coefficients<T>(options, step, grad_scale), static_cast<T>(1.0 - options.smoothing),
          static_cast<T>(path_gain(options.smoothing)), static_cast<T>(walk_moment_sq), learning_rate(options) != 0.0,
          options.reference == 0.0};
}

template <typename T>
CLARA_HD UpdateCoefficients<T> update_coefficients(const GroupOptions& options, T step, const float* grad_scale,
                                                   float lr_scale) {
  return {adam_coefficients<T>(options, step, grad_scale),
          static_cast<T>(learning_rate(options) * static_cast<double>(lr_scale)),
          static_cast<T>(options.decoupled_weight_decay != 0.0 ? options.weight_decay : 0.0)};
}

// ---------------------------------------------------------------------------------------------------------------
// Element math. V is the arithmetic type T itself (CUDA threads) or a vector of T (CPU loops). The order of operations
// is such that nothing overflows that torch.optim.Adam survives: v takes ((1 - beta2) g) g, not (1 - beta2) g^2.
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
CLARA_HD V effective_gradient(V grad, V param, const AdamCoefficients<T>& c) {
  return with_decay(grad * c.grad_factor, c.coupled_decay, param);
}

template <typename V, typename T>
CLARA_HD V first_moment(V m, V grad, const AdamCoefficients<T>& c) {
  return c.beta1 * m + c.one_minus_beta1 * grad;
}

template <typename V, typename T>
CLARA_HD V second_moment(V v, V grad, const AdamCoefficients<T>& c) {
  return c.beta2 * v + (c.one_minus_beta2 * grad) * grad;
}

// Propagates NaN like torch.maximum, unlike fmax.
template <typename V>
CLARA_HD V running_maximum(V maximum, V v) {
  return maximum > v ? maximum : (maximum == maximum ? v : maximum);
}

template <typename V, typename T>
CLARA_HD V within(V x, T bound) {
  const V high = V{} + bound, low = V{} - bound;
  return x > high ? high : x < low ? low : x;
}

// d; under amsgrad the caller passes the running maximum as v.
template <typename V, typename T>
CLARA_HD V denominator(V v, const AdamCoefficients<T>& c) {
  return square_root(v) * c.inverse_root_bias2 + c.eps;
}

// Adam's step u.
template <typename V, typename T>
CLARA_HD V adam_step(V m, V d, const AdamCoefficients<T>& c) {
  return (m / d) * c.inverse_bias1;
}

template <typename V, typename T>
CLARA_HD V updated_parameter(V param, V step, const UpdateCoefficients<T>& c) {
  return param - c.rate * with_decay(step, c.decoupled_decay, param);
}

template <typename V, typename T>
CLARA_HD V extended_path(V path, V step, const MeasureCoefficients<T>& c) {
  return c.path_decay * path + c.path_gain * step;
}

// What elements add to the sums of their tensor: the columns of PathSums but the last.
constexpr int kSums = 8;
template <typename V>
struct ElementSums {
  V columns[kSums];
};

template <typename V, typename W>
CLARA_HD void add(ElementSums<V>& sums, const ElementSums<W>& more) {
  for (int i = 0; i < kSums; ++i) sums.columns[i] += more.columns[i];
}

// What m~^2 = (m/d)^2 is expected to be if the gradient is independent of the past: of both parts of m~, what is kept
// and what is gained, the squares and twice the product. The product of m_before and the gradient has mean 0. Divided by
// d it has not: d depends on this gradient too, which shows where gradients are skewed (rarely large and positive, else
// a little negative, say). Divided by a number that was known before the gradient came it has: by the larger of d_before
// and |m_before|, since d_before may be next to nothing where v forgets at once.
template <typename V, typename T>
CLARA_HD V expected_moment_sq(V m_before, V d_before, V unit_m, V unit_grad, const MeasureCoefficients<T>& c) {
  const V gained = c.adam.one_minus_beta1 * unit_grad, kept = unit_m - gained;
  const V known = within(m_before / d_before, T(1));  // without eps 0 / 0 at a first step, where nobody asks for it
  return c.walk_moment_sq * kept * kept + gained * gained + T(2) * gained * (kept - c.adam.beta1 * known);
}

// `path_before`, `path`: without and with this step; `m_before`, `d_before`: without; `grad` is the effective gradient.
template <typename V, typename T>
CLARA_HD ElementSums<V> element_sums(V path_before, V path, V m_before, V m, V grad, V d_before, V d,
                                     const MeasureCoefficients<T>& c) {
  // An element whose v has overflowed does not move any more, here as in Adam; it must not stop the others' scale.
  const V weight = c.in_adams_metric ? (d == V{} + T(INFINITY) ? V{} : d) : V{} + T(1);
  const V unit_m = m / d, unit_grad = grad / d;
  const V step = adam_step(m, d, c.adam);  // as the caller has it; compilers divide once
  return {{weight * path * path,
           weight * step * step,
           weight * unit_grad * unit_grad,
           weight * path_before * path_before,
           weight * expected_moment_sq(m_before, d_before, unit_m, unit_grad, c),
           weight * path_before * unit_grad,
           weight,
           weight * weight}};
}

// ---------------------------------------------------------------------------------------------------------------
// Adapt: a handful of scalars per tensor. Sums and evidence are additive: over chunks, over the shards of a tensor, and
// evidence also over tensors, which is all that AdamClaraGlobal adds to the others.
// ---------------------------------------------------------------------------------------------------------------

// Over the elements of a tensor that have a path, times c = numel / (number of those). Squares are weighted with d: lengths
// in the metric in which Adam's step is the steepest descent, so that an element counts as much as it matters for the
// loss, and rows of words that do not occur cannot outvote those that do.
struct PathSums {
  double path_sq;         // N
  double step_sq;         // U, of Adam's steps u
  double grad_sq;         // G, of the gradients g~
  double path_before_sq;  // N', of the path before this step, with the weights of this step
  double walk_moment_sq;  // V, of what m~^2 is expected to be, m~ = m/d
  double path_grad;       // X, of the path before this step times g~
  double weight;          // D, of the weights themselves
  double weight_sq;       // D2, of their squares; times c^2
  double numel;           // n, of all elements
};
static_assert(sizeof(PathSums) == (kSums + 1) * sizeof(double), "columns");

// What N is expected to be if every new gradient is independent of the past: a walk whose steps are as long as the
// gradients that came, in whatever pattern they came; and how long these were at most. Kept in the state, 0-dim float32
// each, zeros before the first step. The weights d change with every step, and every length with them. So what is stored
// is what a length is expected to be over what it is, and the next step multiplies that with lengths by its own weights.
struct WalkState {
  float moment_sq;    // V / W; V: expected sum of d m~^2, and W the sum itself
  float path_moment;  // (C / n)^(1/2); C: expected sum of path m, unweighted; it may itself leave the range of floats
  float path_sq;      // P / N; P: expected sum of d path^2
  float grad_peak;    // M, the largest G / D of the last dozens of steps
  // x, the cosine of the angle between the path and the gradient that comes next; averages over some steps of
  // x^2, and of x times the x before it.
  float cosine, cosine_sq, cosine_lag;
};
constexpr int kWalkScalars = 7;
constexpr double kPeakMemory = 0.98;   // of M that is left after a step of smaller gradients
constexpr double kCosineMemory = 0.9;  // of the averages of x that is left after a step

// What the excess is computed from.
struct Evidence {
  double path_sq;       // N
  double walk_sq;       // P
  double long_walk_sq;  // what P would be if all gradients were as long as Adam remembers them (D), or as the longest of
                        // late (M D) if that is less
  double step_sq;       // U
  double step_walk_sq;  // what U is expected to be: U V / W
  double weight;        // D
  double weight_sq;      // D2: what varies independently has variances that add up
  double shared_weight;  // D sqrt(h), of shared noise: what varies together has standard deviations that add up
};
constexpr int kEvidence = 8;

CLARA_HD bool is_finite(double x) { return x - x == 0.0; }
// The second if either is not a number: callers order their arguments by that.
CLARA_HD double larger(double a, double b) { return a > b ? a : b; }
CLARA_HD double smaller(double a, double b) { return a < b ? a : b; }

CLARA_HD double square(double x) { return x * x; }

// The walk after a step with these sums. `step` counts from 1. As it was where a sum is not finite or nothing has moved
// yet.
CLARA_HD WalkState advanced_walk(const WalkState& walk, const PathSums& sums, const GroupOptions& options,
                                 double step) {
  const double beta1 = options.beta1, q = 1.0 - options.smoothing;
  const double bias1 = bias_correction<double>(options.log_beta1, step);
  const double before = sums.path_before_sq, length_sq = square(bias1) * sums.step_sq;  // W
  // Where there is no path yet, the moments may all the same be old (a checkpoint of Adam's): their squares as they are.
  // From a fresh start this is the recursion's own value.
  const double moment_sq = before == 0.0 ? length_sq : larger(square(1.0 - beta1) * sums.grad_sq, sums.walk_moment_sq);
  double path_sq = walk.path_sq * before;
  // At most what lengths allow: elements that v's overflow has taken out of these are still in C.
  double path_moment = smaller(std::sqrt(path_sq) * std::sqrt(moment_sq), beta1 * square(walk.path_moment) * sums.numel);
  if (learning_rate(options) != 0.0) {  // else only m has moved
    const double a = path_gain(options.smoothing) / bias1;
    path_sq = q * q * path_sq + 2.0 * q * a * path_moment + a * a * moment_sq;
    path_moment = q * path_moment + a * moment_sq;
  }
  WalkState next = walk;
  next.moment_sq = length_sq == 0.0 ? 0.0f : static_cast<float>(moment_sq / length_sq);
  next.path_moment = static_cast<float>(std::sqrt(path_moment / sums.numel));
  next.path_sq = static_cast<float>(path_sq / sums.path_sq);
  next.grad_peak = static_cast<float>(larger(sums.grad_sq / sums.weight, kPeakMemory * walk.grad_peak));
  if (before != 0.0 && sums.grad_sq != 0.0) {  // else there is no angle
    const double x = sums.path_grad / (std::sqrt(before) * std::sqrt(sums.grad_sq)), last = walk.cosine;
    const auto averaged = [](float average, double value) {
      return static_cast<float>(kCosineMemory * static_cast<double>(average) + (1.0 - kCosineMemory) * value);
    };
    next.cosine = static_cast<float>(x);
    next.cosine_sq = averaged(walk.cosine_sq, x * x);
    next.cosine_lag = averaged(walk.cosine_lag, x * last);
  }
  const float sum = next.moment_sq + next.path_moment + next.path_sq + next.grad_peak + next.cosine + next.cosine_sq +
                    next.cosine_lag;
  return is_finite(sum) ? next : walk;
}

// The expected path^2 of one element after many steps of unit white noise.
CLARA_HD double unit_walk(const GroupOptions& options) {
  const double beta1 = options.beta1, correlation = beta1 * (1.0 - options.smoothing);
  return (1.0 - beta1) / (1.0 + beta1) * (1.0 + correlation) / (1.0 - correlation);
}

// h = 1 / n' of noise that elements share: n' independent elements would tell as much as these do. x^2 is on average h, as
// long as gradients are independent of those before them. Where they are not, because steps agree or alternate, x times the
// x before it is as large on average, and is subtracted. A little is left wherever something is learned, so it counts from
// 1/40 on, and in full from 1/20.
CLARA_HD double shared_noise(const WalkState& walk) {
  const double lag = static_cast<double>(walk.cosine_lag);
  const double shared = static_cast<double>(walk.cosine_sq) - (lag < 0.0 ? -lag : lag);
  return larger(0.0, smaller(shared, 2.0 * shared - 0.05));
}

// Zeros, so no vote, where nothing moves or the gradients are all zero.
CLARA_HD Evidence evidence_of(const PathSums& sums, const WalkState& walk, const GroupOptions& options) {
  if (learning_rate(options) == 0.0 || sums.grad_sq == 0.0) return {};
  return {sums.path_sq,
          walk.path_sq * sums.path_sq,
          unit_walk(options) * smaller(1.0, walk.grad_peak) * sums.weight,
          sums.step_sq,
          walk.moment_sq * sums.step_sq,
          sums.weight,
          sums.weight_sq,
          std::sqrt(shared_noise(walk)) * sums.weight};
}

// A ratio of sums over few elements says little: as if `neutral` more had shown the expected one.
CLARA_HD double with_prior(double ratio, double count, double neutral) {
  return ratio + (1.0 - ratio) * neutral / (count + neutral);
}

// By how much the path is too long (or, negative, too short); see docs/algorithm.md, "The excess".
CLARA_HD double excess(const Evidence& e) {
  // n': so many elements of equal weight (Kish's effective sample size), or of independent noise, would tell as much. One
  // that outweighs a thousand others must not speak for them.
  const double count = e.weight * e.weight / larger(e.weight_sq, e.shared_weight * e.shared_weight);
  // Long, also with regard to steps of a size that Adam remembers: gradients of that size may return at once.
  const double above = with_prior(e.path_sq / larger(e.walk_sq, e.long_walk_sq), count, 32.0);
  if (above > 1.35) return 1.0 - 1.35 / above;
  // Short, and more so than the momentum can tell within its few steps: what cancels that fast are fast modes, which do
  // not grow worse with time. Except where they leave next to nothing of the steps, or where nothing else cancels: steps
  // that only go to and fro do not settle by themselves.
  const double ratio = e.path_sq / e.walk_sq;
  const double agreement = e.step_sq == 0.0 ? 0.0 : smaller(e.step_sq / e.step_walk_sq, 1.0), lost = 1.0 - agreement;
  const double alternating = larger(0.2 * square(square(lost)), lost * square(smaller(ratio / agreement, 1.0)));
  const double rest = larger(0.4 * square(square(agreement)), alternating);
  const double below = larger(1.0 - 0.5 / with_prior(ratio, count, 8.0), 1.0 - rest / with_prior(ratio, count, 2.0));
  return below < 0.0 ? below : 0.0 * below;  // not a number stays none
}

// The next mu. It stays where adaptation is off, where a sum is not finite, and where nothing has moved.
CLARA_HD float adapted_scale(float scale, const Evidence& e, const GroupOptions& options) {
  const bool known =
      is_finite(e.path_sq + e.walk_sq + e.long_walk_sq + e.step_sq + e.step_walk_sq + e.weight + e.weight_sq +
                e.shared_weight);
  // As first published, for a fixed expectation of path^2 per element; or the walk's.
  const double value = options.reference != 0.0 ? e.path_sq / (e.weight * options.reference) - 1.0 : excess(e);
  if (options.adapt_lr == 0.0 || e.path_sq == 0.0 || !known || !is_finite(value)) return scale;
  double factor = std::exp(options.smoothing / (2.0 * options.damping) * value);
  factor = factor < options.clip_low ? options.clip_low : (factor > options.clip_high ? options.clip_high : factor);
  const double previous = static_cast<double>(scale), b = options.lr_smoothing;
  double next = b * previous + (1.0 - b) * (previous * factor);
  next = next < options.scale_low ? options.scale_low : (next > options.scale_high ? options.scale_high : next);
  return static_cast<float>(next);
}

// Note [Order-free sums]: AdamClaraGlobal adds the evidence of all tensors. So that mu does not depend on the order of
// the parameters, not even in its last bit, the numbers are added as integers: multiples of a unit that is chosen from
// the largest magnitude among them (a maximum does not depend on the order either) such that `count` of them cannot
// overflow. What is lost is below 2^-40 of the largest for a million tensors.
//
// The power of two that turns a value of at most `largest` in magnitude into such an integer.
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
