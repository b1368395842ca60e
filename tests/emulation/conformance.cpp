// The CUDA back end, run by cuda_emulation.h, against scalar float64 formulas written down here once more.
//
//   conformance [name part]...    runs the tests whose names contain one of these, or all
//
// Every step is checked on its own: from what the tensors held before it, the formulas say what they must hold after.
// So nothing accumulates, and the tolerances are those of a few float32 operations and one rounding to storage.
#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/cuda_backend.h"
#include "cuda_emulation.h"

namespace {

using clara::DType;
using clara::GroupOptions;
using clara::PathSums;
using clara::Variant;
using clara::cuda::kChunk;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#define REQUIRE(condition)                                                                               \
  do {                                                                                                   \
    if (!(condition)) throw Failure(std::string("line ") + std::to_string(__LINE__) + ": " #condition);  \
  } while (false)

// ---------------------------------------------------------------------------------------------------------------
// Memory as a tensor has it
// ---------------------------------------------------------------------------------------------------------------

size_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// Bounds of the rounding error of storage: relative, and absolute among subnormal numbers.
struct Precision {
  double relative, absolute;
};
Precision precision_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return {std::ldexp(0.501, -7), 1e-40};
    case DType::kFloat16: return {std::ldexp(0.501, -10), std::ldexp(0.501, -24)};
    default: return {0.0, 1e-44};
  }
}

// `offset` elements, which nobody may touch, and then `count`. It ends where the heap block ends.
class Array {
 public:
  Array(DType dtype, int64_t count, int offset)
      : dtype_(dtype), offset_(offset), count_(count), memory_((offset + count) * bytes_of(dtype), '\x5a') {
    memory_.shrink_to_fit();
  }

  void* data() { return memory_.data() + offset_ * bytes_of(dtype_); }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }
  const std::vector<char>& memory() const { return memory_; }

  double get(int64_t i) const {
    const char* at = memory_.data() + (offset_ + i) * bytes_of(dtype_);
    if (dtype_ == DType::kFloat32) {
      float value;
      std::memcpy(&value, at, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    if (dtype_ == DType::kBFloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    return static_cast<double>(std::bit_cast<_Float16>(bits));
  }

  void set(int64_t i, double value) {
    char* at = memory_.data() + (offset_ + i) * bytes_of(dtype_);
    const float single = static_cast<float>(value);
    if (dtype_ == DType::kFloat32) {
      std::memcpy(at, &single, 4);
    } else {
      // Truncated: how a start value came about does not matter.
      const uint16_t bits = dtype_ == DType::kBFloat16 ? static_cast<uint16_t>(std::bit_cast<uint32_t>(single) >> 16)
                                                       : std::bit_cast<uint16_t>(static_cast<_Float16>(single));
      std::memcpy(at, &bits, 2);
    }
  }

  bool guard_intact() const {
    for (size_t i = 0; i < offset_ * bytes_of(dtype_); ++i) {
      if (memory_[i] != '\x5a') return false;
    }
    return true;
  }

 private:
  DType dtype_;
  size_t offset_;
  int64_t count_;
  std::vector<char> memory_;
};

// ---------------------------------------------------------------------------------------------------------------
// A whole optimizer's worth of tensors
// ---------------------------------------------------------------------------------------------------------------

struct Group {
  double lr = 0.01, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.0;
  bool decoupled = false, maximize = false, amsgrad = false, accumulate = true, adapt_lr = true;
  double smoothing = 0.05, damping = 2.5, lr_smoothing = 0.9;
  double reference = 0.0;  // 0: random walk
  bool measured_walk = false;
  double clip_low = 0.5, clip_high = 1.05;
  double scale_low = 1e-4, scale_high = 1e4;
  int lr_tensor = 0;  // 4: float32, 8: float64
};

struct Setup {
  DType param = DType::kFloat32, grad = DType::kFloat32, path = DType::kFloat32;
  Variant variant = Variant::kLocal;
  bool deferred = false;
  std::vector<Group> groups = {Group{}};
  std::vector<int64_t> sizes;
  bool misaligned = false;
  double grad_scale = 0.0;  // 0: none
  float found_inf = -1.0f;  // -1: none
  double grad_size = 1.0;
  uint64_t seed = 1;
};

// kappa_1 ... kappa_count, by the recursion of docs/algorithm.md.
std::vector<double> random_walk(double beta1, double smoothing, int count) {
  const double q = 1.0 - smoothing, s = std::sqrt(smoothing * (2.0 - smoothing));
  std::vector<double> kappa;
  double v = 0.0, c = 0.0, p = 0.0;
  for (int t = 1; t <= count; ++t) {
    const double a = s / (1.0 - std::pow(beta1, t));
    v = beta1 * beta1 * v + (1.0 - beta1) * (1.0 - beta1);
    const double previous_c = c;
    c = q * beta1 * c + a * v;
    p = q * q * p + 2.0 * q * a * beta1 * previous_c + a * a * v;
    kappa.push_back(p);
  }
  return kappa;
}

double random_walk_limit(double beta1, double smoothing) {
  const double q = 1.0 - smoothing;
  return (1.0 - beta1) / (1.0 + beta1) * (1.0 + beta1 * q) / (1.0 - beta1 * q);
}

// E[u^2] on pure noise: V_t / (1 - beta1^t)^2.
double step_variance(double beta1, int64_t step) {
  double v = 0.0;
  for (int64_t t = 0; t < step; ++t) v = beta1 * beta1 * v + (1.0 - beta1) * (1.0 - beta1);
  return v / std::pow(1.0 - std::pow(beta1, step), 2.0);
}

constexpr int kTableLength = 300;
constexpr int kLastStep = 5000;

// Beyond the back end's table too, where the recursion just goes on.
double expected_kappa(const Group& group, int64_t step) {
  if (group.reference != 0.0) return group.reference;
  static std::map<std::pair<double, double>, std::vector<double>> known;
  std::vector<double>& kappa = known[{group.beta1, group.smoothing}];
  if (kappa.empty()) kappa = random_walk(group.beta1, group.smoothing, kLastStep + 10);
  return kappa.at(static_cast<size_t>(step - 1));
}

struct Tensor {
  Tensor(const Setup& setup, int64_t count, int group_index, const std::function<int()>& offset)
      : group(group_index),
        param(setup.param, count, offset()),
        grad(setup.grad, count, offset()),
        exp_avg(DType::kFloat32, count, offset()),
        exp_avg_sq(DType::kFloat32, count, offset()),
        max_exp_avg_sq(DType::kFloat32, count, offset()),
        path(setup.path, count, offset()),
        step(DType::kFloat32, 1, 0),
        lr_scale(DType::kFloat32, 1, 0) {}

  int group;
  Array param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, path, step, lr_scale;

  std::vector<const Array*> state() const {
    return {&param, &exp_avg, &exp_avg_sq, &max_exp_avg_sq, &path, &step, &lr_scale};
  }
};

class Optimizer {
 public:
  explicit Optimizer(const Setup& setup) : setup_(setup), random_(setup.seed) {
    const auto offset = [this] { return setup_.misaligned ? static_cast<int>(random_() % 5) : 0; };
    const int steps[] = {0, 0, 1, 7, 40, kTableLength - 2, kTableLength, kLastStep};
    for (size_t i = 0; i < setup.sizes.size(); ++i) {
      tensors_.push_back(std::make_unique<Tensor>(setup, setup.sizes[i], static_cast<int>(i % setup.groups.size()),
                                                  offset));
      Tensor& t = *tensors_.back();
      t.step.set(0, steps[random_() % std::size(steps)]);
      t.lr_scale.set(0, setup.variant == Variant::kGlobal ? 1.0 : uniform(0.5, 2.0));
      for (int64_t k = 0; k < t.param.count(); ++k) {
        t.param.set(k, uniform(-1.0, 1.0));
        t.exp_avg.set(k, uniform(-0.1, 0.1));
        t.exp_avg_sq.set(k, uniform(0.0, 0.1));
        t.max_exp_avg_sq.set(k, uniform(0.0, 0.1));
        t.path.set(k, uniform(-1.0, 1.0));
      }
    }
    for (const Group& group : setup.groups) {
      tables_.push_back(random_walk(group.beta1, group.smoothing, kTableLength));
      if (group.measured_walk) {
        for (int t = 1; t <= kTableLength; ++t) {
          tables_.back()[static_cast<size_t>(t - 1)] /= step_variance(group.beta1, t);
        }
      }
      lr_tensors_.push_back({static_cast<float>(group.lr), group.lr});
    }
    if (setup.variant == Variant::kGlobal) shared_scale_ = &tensors_.at(0)->lr_scale;
    describe();
    draw_gradients();
  }

  void draw_gradients() {
    for (auto& t : tensors_) {
      for (int64_t k = 0; k < t->grad.count(); ++k) t->grad.set(k, setup_.grad_size * uniform(-1.0, 1.0));
    }
  }

  // The order in which the list names the tensors: its own, or reversed.
  void reverse() {
    reversed_ = !reversed_;
    describe();
  }

  Array& scale_of(Tensor& t) { return shared_scale_ != nullptr ? *shared_scale_ : t.lr_scale; }
  Tensor& tensor(size_t i) { return *tensors_[i]; }
  std::vector<std::unique_ptr<Tensor>>& tensors() { return tensors_; }
  Setup& setup() { return setup_; }
  clara::cuda::Placement placement() { return {1, reinterpret_cast<void*>(0x57ea), memory_.data()}; }

  clara::TensorList& list() {
    for (size_t i = 0; i < tensors_.size(); ++i) grads_[i] = ordered(i).grad.data();
    for (size_t g = 0; g < setup_.groups.size(); ++g) groups_[g] = options(g);
    grad_scale_ = static_cast<float>(setup_.grad_scale);
    found_inf_ = setup_.found_inf;
    list_.tensors = records_.data();
    list_.count = static_cast<int64_t>(records_.size());
    list_.grads = grads_.data();
    list_.groups = groups_.data();
    list_.group_count = static_cast<int64_t>(groups_.size());
    list_.grad_scale = setup_.grad_scale != 0.0 ? &grad_scale_ : nullptr;
    list_.found_inf = setup_.found_inf >= 0.0f ? &found_inf_ : nullptr;
    list_.param_dtype = setup_.param;
    list_.grad_dtype = setup_.grad;
    list_.path_dtype = setup_.path;
    list_.variant = setup_.variant;
    list_.deferred = setup_.deferred;
    return list_;
  }

  // The sums that the last whole step left behind, in the order of the tensors.
  PathSums sums_of(size_t i) {
    const auto offsets = clara::cuda::layout(list_.count, list_.chunk_count);
    PathSums sums;
    const size_t row = reversed_ ? tensors_.size() - 1 - i : i;
    std::memcpy(&sums, memory_.data() + offsets.sums + static_cast<int64_t>(row * sizeof sums), sizeof sums);
    return sums;
  }

  double uniform(double low, double high) { return low + (high - low) * std::generate_canonical<double, 32>(random_); }

 private:
  Tensor& ordered(size_t i) { return *tensors_[reversed_ ? tensors_.size() - 1 - i : i]; }

  GroupOptions options(size_t g) {
    const Group& group = setup_.groups[g];
    GroupOptions o{};
    o.lr = group.lr_tensor == 0 ? group.lr : std::numeric_limits<double>::quiet_NaN();
    if (group.lr_tensor == 4) o.lr_tensor = &lr_tensors_[g].single;
    if (group.lr_tensor == 8) o.lr_tensor = &lr_tensors_[g].twice;
    o.lr_tensor_is_double = group.lr_tensor == 8;
    o.maximize = group.maximize;
    o.decoupled_weight_decay = group.decoupled;
    o.accumulate = group.accumulate;
    o.adapt_lr = group.adapt_lr;
    o.scale_rule = setup_.variant == Variant::kSmoothed ? clara::ScaleRule::kSmoothed : clara::ScaleRule::kFactor;
    o.beta1 = group.beta1;
    o.beta2 = group.beta2;
    o.log_beta1 = std::log(group.beta1);
    o.log_beta2 = std::log(group.beta2);
    o.eps = group.eps;
    o.weight_decay = group.weight_decay;
    o.path_decay = 1.0 - group.smoothing;
    o.path_gain = std::sqrt(group.smoothing * (2.0 - group.smoothing));
    o.factor_gain = group.smoothing / (2.0 * group.damping);
    o.walk_unit = group.measured_walk ? clara::WalkUnit::kStepSquared : clara::WalkUnit::kElement;
    o.clip_low = group.clip_low;
    o.clip_high = group.clip_high;
    o.lr_smoothing = group.lr_smoothing;
    o.scale_low = group.scale_low;
    o.scale_high = group.scale_high;
    if (group.reference != 0.0) {
      o.reference = {nullptr, 0, group.reference, 0.0};
    } else {
      const double units = group.measured_walk ? (1.0 + group.beta1) / (1.0 - group.beta1) : 1.0;
      o.reference = {tables_[g].data(), kTableLength, units * random_walk_limit(group.beta1, group.smoothing),
                     2.0 * std::log(1.0 - group.smoothing)};
    }
    return o;
  }

  void describe() {
    records_.clear();
    list_.chunk_count = 0;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Tensor& t = ordered(i);
      records_.push_back({t.param.data(), t.exp_avg.data(), t.exp_avg_sq.data(),
                          setup_.groups[t.group].amsgrad ? t.max_exp_avg_sq.data() : nullptr, t.path.data(),
                          static_cast<float*>(t.step.data()), static_cast<float*>(scale_of(t).data()), t.param.count(),
                          list_.chunk_count, t.group, 0});
      list_.chunk_count += clara::cuda::chunks_of(t.param.count());
    }
    grads_.resize(tensors_.size());
    groups_.resize(setup_.groups.size());
    const auto offsets = clara::cuda::layout(static_cast<int64_t>(records_.size()), list_.chunk_count);
    memory_.assign(static_cast<size_t>(offsets.bytes), '\xff');  // scratch has no initial value
    clara::cuda::write_table(records_.data(), static_cast<int64_t>(records_.size()), memory_.data());
  }

  struct LrTensor {
    float single;
    double twice;
  };

  Setup setup_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
  std::vector<std::vector<double>> tables_;
  std::vector<LrTensor> lr_tensors_;
  Array* shared_scale_ = nullptr;
  bool reversed_ = false;
  float grad_scale_ = 0.0f, found_inf_ = 0.0f;
  clara::TensorList list_{};
  std::vector<clara::TensorRecord> records_;
  std::vector<const void*> grads_;
  std::vector<GroupOptions> groups_;
  std::vector<char> memory_;
};

// ---------------------------------------------------------------------------------------------------------------
// What a step must do
// ---------------------------------------------------------------------------------------------------------------

// Everything the kernels may read or write, as bytes.
std::vector<std::vector<char>> snapshot(Optimizer& optimizer) {
  std::vector<std::vector<char>> copies;
  for (auto& t : optimizer.tensors()) {
    for (const Array* array : t->state()) copies.push_back(array->memory());
  }
  return copies;
}

struct Before {
  explicit Before(Optimizer& optimizer) {
    for (auto& t : optimizer.tensors()) {
      tensors.push_back(*t);
      scales.push_back(optimizer.scale_of(*t).get(0));
    }
  }
  std::vector<Tensor> tensors;
  std::vector<double> scales;
};

struct Place {
  size_t tensor;
  int64_t element = -1;
};

void require_close(double got, double want, double tolerance, Place place, const char* what) {
  if (std::isnan(want) && std::isnan(got)) return;
  if (std::isinf(want) && got == want) return;
  if (std::fabs(got - want) <= tolerance) return;
  char text[200];
  std::snprintf(text, sizeof text, "tensor %zu, element %lld: %s: got %.9g, expected %.9g +- %.2g", place.tensor,
                static_cast<long long>(place.element), what, got, want, tolerance);
  throw Failure(text);
}

// Above the walk and below 0.6 of it, relative to the path; in between the scale rests.
double excess_over_measured_walk(double ratio) {
  return ratio > 1.0 ? 1.0 - 1.0 / ratio : ratio < 0.6 ? 1.0 - 0.6 / ratio : 0.0;
}

double next_scale(double scale, double ratio, double path_sq, const Group& g, Variant variant) {
  if (!g.adapt_lr || !std::isfinite(ratio) || path_sq == 0.0) return scale;
  const double excess = g.measured_walk ? excess_over_measured_walk(ratio) : ratio - 1.0;
  const double f = std::min(std::max(std::exp(g.smoothing / (2.0 * g.damping) * excess), g.clip_low), g.clip_high);
  double next = g.accumulate ? scale * f : f;
  if (variant == Variant::kSmoothed) next = g.lr_smoothing * scale + (1.0 - g.lr_smoothing) * next;
  return std::min(std::max(next, g.scale_low), g.scale_high);
}

// Checks moments, path, norm and step of a tensor, and returns Adam's step and the bound of its error per element.
struct Direction {
  double u, tolerance;
};

std::vector<Direction> check_measured(const Setup& setup, const Tensor& before, const Tensor& after, double steps,
                                      const PathSums& sums, size_t index) {
  const Group& g = setup.groups[static_cast<size_t>(after.group)];
  const double t = before.step.get(0) + steps;
  const double bias1 = 1.0 - std::pow(g.beta1, t), bias2 = 1.0 - std::pow(g.beta2, t);
  const double q = 1.0 - g.smoothing, s = std::sqrt(g.smoothing * (2.0 - g.smoothing));
  std::vector<Direction> directions;
  double norm = 0.0, step_sq = 0.0, step_sq_tolerance = 0.0;
  for (int64_t k = 0; k < after.param.count(); ++k) {
    const Place where = {index, k};
    double grad = before.grad.get(k);
    if (setup.grad_scale != 0.0) grad /= setup.grad_scale;
    if (g.maximize) grad = -grad;
    const double coupled = g.decoupled ? 0.0 : g.weight_decay * before.param.get(k);
    const double grad_size = std::fabs(grad) + std::fabs(coupled);
    grad += coupled;

    const double m = g.beta1 * before.exp_avg.get(k) + (1.0 - g.beta1) * grad;
    const double m_size = std::fabs(g.beta1 * before.exp_avg.get(k)) + (1.0 - g.beta1) * grad_size;
    const double v = g.beta2 * before.exp_avg_sq.get(k) + (1.0 - g.beta2) * grad * grad;
    const double v_size = g.beta2 * before.exp_avg_sq.get(k) + (1.0 - g.beta2) * grad_size * grad_size;
    require_close(after.exp_avg.get(k), m, 4e-7 * m_size + 1e-44, where, "exp_avg");
    require_close(after.exp_avg_sq.get(k), v, 1e-6 * v_size + 1e-44, where, "exp_avg_sq");
    double second = v;
    if (g.amsgrad) {
      second = std::isnan(v) ? v : std::max(before.max_exp_avg_sq.get(k), v);
      require_close(after.max_exp_avg_sq.get(k), second, 1e-6 * (v_size + second), where, "max_exp_avg_sq");
    }

    const double denominator = std::sqrt(second / bias2) + g.eps;
    const double u = m / bias1 / denominator;
    const double u_tolerance = 4e-6 * (m_size / bias1 / denominator) + 1e-40;
    directions.push_back({u, u_tolerance});
    step_sq += u * u;
    step_sq_tolerance += 2.0 * std::fabs(u) * u_tolerance + 3e-6 * u * u;
    const double path = q * before.path.get(k) + s * u;
    const Precision rounding = precision_of(setup.path);
    require_close(after.path.get(k), path,
                  s * u_tolerance + 4e-7 * (std::fabs(q * before.path.get(k)) + std::fabs(s * u)) +
                      rounding.relative * std::fabs(path) + rounding.absolute,
                  where, "path");
    norm += after.path.get(k) * after.path.get(k);
  }
  require_close(sums.path_sq, norm, 3e-6 * norm, {index}, "path_sq");
  const double kappa = expected_kappa(g, std::lround(t));
  if (g.measured_walk) {
    const double walk = kappa / step_variance(g.beta1, std::lround(t));
    require_close(sums.expected_path_sq, walk * step_sq, walk * step_sq_tolerance, {index}, "expected_path_sq");
  } else {
    const double expected = static_cast<double>(after.param.count()) * kappa;
    require_close(sums.expected_path_sq, expected, 1e-9 * expected, {index}, "expected_path_sq");
  }
  return directions;
}

void check_applied(const Setup& setup, const Tensor& before, const Tensor& after,
                   const std::vector<Direction>& directions, double scale, size_t index) {
  const Group& g = setup.groups[static_cast<size_t>(after.group)];
  const Precision rounding = precision_of(setup.param);
  for (int64_t k = 0; k < after.param.count(); ++k) {
    const double theta = before.param.get(k);
    const Direction& d = directions[static_cast<size_t>(k)];
    const double decay = g.decoupled ? g.weight_decay * theta : 0.0;
    const double want = theta - g.lr * scale * (d.u + decay);
    const double step_size = g.lr * scale * (std::fabs(d.u) + std::fabs(decay));
    const double tolerance = g.lr * scale * d.tolerance + 1e-6 * step_size + 2e-7 * (std::fabs(theta) + step_size) +
                             rounding.relative * std::fabs(want) + rounding.absolute;
    require_close(after.param.get(k), want, tolerance, {index, k}, "param");
  }
}

// Takes a step and checks all of it.
void checked_step(Optimizer& optimizer, int max_launches = 0) {
  const Setup& setup = optimizer.setup();
  if (max_launches == 0) max_launches = setup.deferred ? 2 : 3;
  const Before before(optimizer);
  const int launches = emulation::runtime.launches;
  clara::cuda::step(optimizer.list(), optimizer.placement());
  REQUIRE(emulation::runtime.launches - launches <= max_launches);
  REQUIRE(emulation::runtime.last_launch_device == 1 && emulation::runtime.device == 0);
  REQUIRE(emulation::runtime.last_launch_stream == optimizer.placement().stream);

  std::vector<std::vector<Direction>> directions;
  double total = 0.0, expected_total = 0.0;
  for (size_t i = 0; i < optimizer.tensors().size(); ++i) {
    Tensor& after = optimizer.tensor(i);
    const PathSums sums = optimizer.sums_of(i);
    directions.push_back(check_measured(setup, before.tensors[i], after, 1.0, sums, i));
    REQUIRE(after.step.get(0) == before.tensors[i].step.get(0) + 1.0);
    for (const Array* array : after.state()) REQUIRE(array->guard_intact());
    total += sums.path_sq;
    expected_total += sums.expected_path_sq;
  }
  for (size_t i = 0; i < optimizer.tensors().size(); ++i) {
    const PathSums sums = setup.variant == Variant::kGlobal ? PathSums{total, expected_total} : optimizer.sums_of(i);
    const Group& g = setup.groups[static_cast<size_t>(optimizer.tensor(i).group)];
    const double scale = next_scale(before.scales[i], sums.path_sq / sums.expected_path_sq, sums.path_sq, g, setup.variant);
    require_close(optimizer.scale_of(optimizer.tensor(i)).get(0), scale, 2e-7 * scale, {i}, "lr_scale");
    check_applied(setup, before.tensors[i], optimizer.tensor(i), directions[i],
                  setup.deferred ? before.scales[i] : scale, i);
  }
}

void checked_steps(const Setup& setup, int count) {
  Optimizer optimizer(setup);
  for (int i = 0; i < count; ++i) {
    if (i > 0) optimizer.draw_gradients();
    checked_step(optimizer);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// The tests
// ---------------------------------------------------------------------------------------------------------------

struct Test {
  std::string name;
  std::function<void()> run;
};

// Around the borders of a vector (4), a warp's and a block's run of vectors (128, 1024) and a chunk.
const std::vector<int64_t> kBorderSizes = {0,    1,    2,    3,    4,          5,      7,          8,
                                           9,    127,  128,  129,  0,          1023,   1024,       1025,
                                           1027, 2047, 2049, 3071, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk + 3, 0};
const std::vector<int64_t> kFewSizes = {5, 0, 130, 1026, kChunk + 6};

struct Storage {
  DType param, grad, path;
};
std::vector<Storage> all_storage() {
  std::vector<Storage> all;
  for (DType path : {DType::kFloat32, DType::kBFloat16}) {
    all.push_back({DType::kFloat32, DType::kFloat32, path});
    for (DType param : {DType::kBFloat16, DType::kFloat16}) {
      all.push_back({param, param, path});
      all.push_back({param, DType::kFloat32, path});
    }
  }
  return all;
}

struct Mode {
  const char* name;
  std::function<void(Setup&)> set;
};

Group& only(Setup& setup) { return setup.groups[0]; }

const std::vector<Mode> kModes = {
    {"plain", [](Setup&) {}},
    {"amsgrad", [](Setup& s) { only(s).amsgrad = true; }},
    {"maximize", [](Setup& s) { only(s).maximize = true; }},
    {"coupled-decay", [](Setup& s) { only(s).weight_decay = 0.1; }},
    {"decoupled-decay", [](Setup& s) { only(s).weight_decay = 0.1, only(s).decoupled = true; }},
    {"coupled-decay-amsgrad-maximize-scaled",
     [](Setup& s) {
       only(s).weight_decay = 0.1;
       only(s).amsgrad = only(s).maximize = true;
       s.grad_scale = 1024.0;
       s.grad_size = 1024.0;
     }},
    {"float32-lr-tensor", [](Setup& s) { only(s).lr_tensor = 4; }},
    {"float64-lr-tensor", [](Setup& s) { only(s).lr_tensor = 8; }},
    {"not-accumulated-fixed-reference", [](Setup& s) { only(s).accumulate = false, only(s).reference = 1.0; }},
    {"measured-walk", [](Setup& s) { only(s).measured_walk = true, only(s).damping = 0.5; }},
    {"measured-walk-amsgrad-scaled",
     [](Setup& s) {
       only(s).measured_walk = only(s).amsgrad = true;
       s.grad_scale = 1024.0;
       s.grad_size = 1024.0;
     }},
    {"not-clipped",
     [](Setup& s) { only(s).clip_low = 0.0, only(s).clip_high = std::numeric_limits<double>::infinity(); }},
    {"bounded", [](Setup& s) { only(s).scale_low = 0.9, only(s).scale_high = 0.95; }},
    {"adapt-off", [](Setup& s) { only(s).adapt_lr = false; }},
    {"found-no-inf", [](Setup& s) { s.found_inf = 0.0f; }},
    {"no-beta1", [](Setup& s) { only(s).beta1 = 0.0; }},
    {"large-eps-long-memory", [](Setup& s) { only(s).eps = 1e-2, only(s).smoothing = 0.2, only(s).beta2 = 0.9999; }},
};

const char* name_of(Variant variant) {
  return variant == Variant::kGlobal ? "global" : variant == Variant::kLocal ? "local" : "smoothed";
}
constexpr Variant kVariants[] = {Variant::kGlobal, Variant::kLocal, Variant::kSmoothed};

// Several groups whose options differ wherever they may.
std::vector<Group> various_groups(int count, Variant variant) {
  std::vector<Group> groups(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    Group& g = groups[static_cast<size_t>(i)];
    g.lr = 0.001 * (1 + i % 17);
    g.beta1 = i % 2 ? 0.8 : 0.9;
    g.beta2 = i % 3 ? 0.99 : 0.999;
    g.weight_decay = 0.05 * (i % 4);
    g.decoupled = i % 8 >= 4;
    g.maximize = i % 5 == 1;
    g.amsgrad = i % 3 == 1;
    g.lr_tensor = i % 3 * 4;
    if (variant != Variant::kGlobal) g.smoothing = i % 2 ? 0.05 : 0.1;
  }
  return groups;
}

void require_unchanged_by(Optimizer& optimizer, const std::function<void()>& operation) {
  const auto before = snapshot(optimizer);
  operation();
  REQUIRE(snapshot(optimizer) == before);
}

void infinite_gradients_change_nothing() {
  for (Variant variant : kVariants) {
    for (bool deferred : {false, true}) {
      Setup setup;
      setup.sizes = kFewSizes;
      setup.variant = variant;
      setup.deferred = deferred;
      setup.grad_scale = 8.0;
      setup.found_inf = 1.0f;
      Optimizer optimizer(setup);
      auto& list = optimizer.list();
      std::vector<PathSums> sums(setup.sizes.size());
      list.sums = sums.data();
      require_unchanged_by(optimizer, [&] { clara::cuda::step(list, optimizer.placement()); });
      require_unchanged_by(optimizer, [&] {
        clara::cuda::measure(list, optimizer.placement());
        clara::cuda::adapt(list, variant == Variant::kGlobal ? nullptr : sums.data(), optimizer.placement());
        clara::cuda::apply(list, optimizer.placement());
      });
      optimizer.setup().found_inf = 0.0f;
      checked_step(optimizer);
    }
  }
}

void non_finite_and_zero_gradients() {
  for (Variant variant : kVariants) {
    Setup setup;
    setup.sizes = {6, 2000, 3};
    setup.variant = variant;
    Optimizer optimizer(setup);
    optimizer.tensor(1).grad.set(1999, std::numeric_limits<double>::quiet_NaN());
    optimizer.tensor(2).grad.set(1, std::numeric_limits<double>::infinity());
    const double scale = optimizer.scale_of(optimizer.tensor(1)).get(0);
    checked_step(optimizer);
    REQUIRE(optimizer.scale_of(optimizer.tensor(1)).get(0) == scale);

    setup.grad_size = 0.0;
    Optimizer resting(setup);
    for (auto& t : resting.tensors()) {
      for (int64_t k = 0; k < t->param.count(); ++k) t->exp_avg.set(k, 0.0), t->path.set(k, 0.0);
    }
    const double before = resting.scale_of(resting.tensor(0)).get(0);
    checked_step(resting);
    REQUIRE(resting.scale_of(resting.tensor(0)).get(0) == before);
  }
}

// Sums that were completed elsewhere (over ranks), and a scale that was.
void verbs_one_by_one() {
  for (Variant variant : kVariants) {
    for (bool deferred : {false, true}) {
      Setup setup;
      setup.sizes = kBorderSizes;
      setup.variant = variant;
      setup.deferred = deferred;
      setup.groups = various_groups(3, variant);
      Optimizer optimizer(setup);
      const Before before(optimizer);
      auto& list = optimizer.list();
      std::vector<PathSums> sums(setup.sizes.size());
      list.sums = sums.data();
      clara::cuda::measure(list, optimizer.placement());
      std::vector<std::vector<Direction>> directions;
      for (size_t i = 0; i < sums.size(); ++i) {
        REQUIRE(optimizer.tensor(i).step.get(0) == before.tensors[i].step.get(0));
        directions.push_back(check_measured(setup, before.tensors[i], optimizer.tensor(i), 1.0, sums[i], i));
        sums[i].path_sq *= 1.5;
        sums[i].expected_path_sq *= 1.25;
      }
      const bool global = variant == Variant::kGlobal;
      if (global) optimizer.scale_of(optimizer.tensor(0)).set(0, 0.75);
      clara::cuda::adapt(list, global ? nullptr : sums.data(), optimizer.placement());
      clara::cuda::apply(list, optimizer.placement());
      for (size_t i = 0; i < sums.size(); ++i) {
            const Group& g = setup.groups[static_cast<size_t>(optimizer.tensor(i).group)];
        const double ratio = sums[i].path_sq / sums[i].expected_path_sq;
        const double scale = global ? 0.75 : next_scale(before.scales[i], ratio, sums[i].path_sq, g, variant);
        REQUIRE(optimizer.tensor(i).step.get(0) == before.tensors[i].step.get(0) + 1.0);
        require_close(optimizer.scale_of(optimizer.tensor(i)).get(0), scale, 2e-7 * scale, {i}, "lr_scale");
        check_applied(setup, before.tensors[i], optimizer.tensor(i), directions[i],
                      deferred ? before.scales[i] : scale, i);
      }
    }
  }
}

// Bitwise, for any order of blocks and of tensors, and (but for the position of tensors in memory) any alignment.
void same_bits_in_any_order() {
  for (Variant variant : kVariants) {
    Setup setup;
    setup.sizes = kBorderSizes;
    setup.variant = variant;
    setup.groups = various_groups(4, variant);
    std::vector<std::vector<std::vector<char>>> results;
    for (bool reversed : {false, true}) {
      emulation::Emulator::instance().seed = reversed ? 11 : 77;
      Optimizer optimizer(setup);
      if (reversed) optimizer.reverse();
      for (int i = 0; i < 3; ++i) {
        if (i > 0) optimizer.draw_gradients();
        clara::cuda::step(optimizer.list(), optimizer.placement());
      }
      results.push_back(snapshot(optimizer));
    }
    REQUIRE(results[0] == results[1]);
  }
}

// Norms of single tensors, which alignment must not change.
void same_norms_at_any_alignment() {
  std::vector<std::vector<double>> norms;
  for (int offset : {0, 1}) {
    Setup setup;
    setup.sizes = kBorderSizes;
    Optimizer optimizer(setup);
    std::mt19937_64 random(3);
    for (size_t i = 0; i < optimizer.tensors().size(); ++i) {
      Tensor& t = optimizer.tensor(i);
      for (int64_t k = 0; k < t.grad.count(); ++k) {
        t.grad.set(k, std::generate_canonical<double, 32>(random) - 0.5);
      }
      if (offset != 0) {
        Array moved(t.grad.dtype(), t.grad.count(), offset);
        for (int64_t k = 0; k < t.grad.count(); ++k) moved.set(k, t.grad.get(k));
        t.grad = moved;
      }
    }
    clara::cuda::step(optimizer.list(), optimizer.placement());
    norms.emplace_back();
    for (size_t i = 0; i < optimizer.tensors().size(); ++i) norms.back().push_back(optimizer.sums_of(i).path_sq);
  }
  REQUIRE(norms[0] == norms[1]);
}

int launches_of_step(Optimizer& optimizer) {
  const int before = emulation::runtime.launches;
  clara::cuda::step(optimizer.list(), optimizer.placement());
  return emulation::runtime.launches - before;
}

void launches_do_not_grow_with_tensors() {
  for (bool deferred : {false, true}) {
    for (int64_t count : {1, 400, 3000}) {
      Setup setup;
      setup.deferred = deferred;
      setup.variant = Variant::kGlobal;
      setup.groups = various_groups(40, setup.variant);
      setup.sizes.assign(static_cast<size_t>(count), 1);
      Optimizer optimizer(setup);
      REQUIRE(launches_of_step(optimizer) == (deferred ? 2 : 3));
    }
  }
}

// Lists that are cut into several launches: by tensors, and by groups.
void more_than_one_launch_holds() {
  struct Many {
    int tensors, groups;
  };
  for (Variant variant : kVariants) {
    for (Many many : {Many{4200, 2}, Many{400, 400}}) {
      Setup setup;
      setup.variant = variant;
      setup.groups = various_groups(many.groups, variant);
      for (int i = 0; i < many.tensors; ++i) setup.sizes.push_back(i % 4);
      Optimizer optimizer(setup);
      checked_step(optimizer, /*max_launches=*/20);
    }
  }
}

void no_tensors_no_launches() {
  Setup setup;
  Optimizer optimizer(setup);
  REQUIRE(launches_of_step(optimizer) == 0);
  setup.sizes = {0, 0};
  Optimizer empty(setup);
  checked_step(empty);  // counts steps all the same
}

void errors_name_the_kernel() {
  Setup setup;
  setup.sizes = kFewSizes;
  Optimizer optimizer(setup);
  std::string message;
  emulation::runtime.next_launch_fails = true;
  try {
    clara::cuda::step(optimizer.list(), optimizer.placement());
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  REQUIRE(message == "clara_fused: kernel measure failed on cuda:1: cudaErrorLaunchFailure: emulated failure");
  REQUIRE(emulation::runtime.device == 0);
  checked_step(optimizer);  // the failure is not told a second time
  for (DType unserved : {DType::kFloat64, DType::kFloat16}) {
    optimizer.setup().param = unserved;
    optimizer.setup().grad = DType::kBFloat16;
    bool refused = false;
    try {
      clara::cuda::step(optimizer.list(), optimizer.placement());
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    REQUIRE(refused);
  }
  REQUIRE(clara::cuda::device_problem(1).empty() && !clara::cuda::device_problem(2).empty());
  emulation::runtime.driver_version = 12080;
  REQUIRE(clara::cuda::device_problem(0).find("serves CUDA 12.8; this build of the core needs one for 13.0") !=
          std::string::npos);
  emulation::runtime.driver_version = 13000;
}

std::vector<Test> all_tests() {
  std::vector<Test> tests;
  for (const Storage& storage : all_storage()) {
    const std::string types = std::string(name_of(storage.param)) + "-" + name_of(storage.grad) + "-" + name_of(storage.path);
    for (Variant variant : kVariants) {
      for (bool deferred : {false, true}) {
        Setup base;
        base.param = storage.param;
        base.grad = storage.grad;
        base.path = storage.path;
        base.variant = variant;
        base.deferred = deferred;
        const std::string name = types + "/" + name_of(variant) + (deferred ? "-deferred/" : "/");
        for (const Mode& mode : kModes) {
          Setup setup = base;
          setup.sizes = kFewSizes;
          mode.set(setup);
          tests.push_back({"modes/" + name + mode.name, [setup] { checked_steps(setup, 2); }});
        }
        for (bool misaligned : {false, true}) {
          Setup setup = base;
          setup.sizes = kBorderSizes;
          setup.misaligned = misaligned;
          setup.groups = various_groups(5, variant);
          tests.push_back({"borders/" + name + (misaligned ? "misaligned" : "aligned"), [setup] { checked_steps(setup, 2); }});
        }
      }
    }
  }
  tests.push_back({"infinite gradients change nothing", infinite_gradients_change_nothing});
  tests.push_back({"non-finite and zero gradients", non_finite_and_zero_gradients});
  tests.push_back({"verbs one by one", verbs_one_by_one});
  tests.push_back({"same bits in any order", same_bits_in_any_order});
  tests.push_back({"same norms at any alignment", same_norms_at_any_alignment});
  tests.push_back({"launches do not grow with tensors", launches_do_not_grow_with_tensors});
  tests.push_back({"more than one launch holds", more_than_one_launch_holds});
  tests.push_back({"no tensors, no launches", no_tensors_no_launches});
  tests.push_back({"errors name the kernel", errors_name_the_kernel});
  return tests;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> wanted(argv + 1, argv + argc);
  int passed = 0, failed = 0;
  for (const Test& test : all_tests()) {
    bool chosen = wanted.empty();
    for (const std::string& part : wanted) chosen = chosen || test.name.find(part) != std::string::npos;
    if (!chosen) continue;
    emulation::Emulator::instance().seed = std::hash<std::string>{}(test.name);
    try {
      test.run();
      ++passed;
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s: %s\n", test.name.c_str(), error.what());
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
