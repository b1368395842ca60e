// The CUDA back end, run by cuda_emulation.h, against scalar float64 formulas written down here once more.
//
//   conformance [name part]...    runs the tests whose names contain one of these, or all
//
// Every step is checked on its own: from what the tensors held before it, the formulas say what they must hold after.
// So nothing accumulates, and the tolerances are those of a few float32 operations and one rounding to storage. What an
// element adds to the sums, and what becomes of them, is taken from adam_clara.h, in double: other tests are about that.
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
#include "../../csrc/cuda/tuning.h"
#include "cuda_emulation.h"

namespace {

using clara::DType;
using clara::ElementSums;
using clara::Evidence;
using clara::GroupOptions;
using clara::PathSums;
using clara::WalkState;
using clara::cuda::kChunk;
using clara::cuda::kPathChunk;

double* columns(PathSums& sums) { return &sums.path_sq; }
const double* columns(const PathSums& sums) { return &sums.path_sq; }
double* columns(Evidence& evidence) { return &evidence.path_sq; }

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

enum class Variant { kGlobal, kLocal, kSmoothed };

struct Group {
  double lr = 0.01, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.0;
  bool decoupled = false, maximize = false, amsgrad = false, adapt_lr = true;
  double smoothing = 0.05, damping = 0.5;
  double reference = 0.0;  // 0: random walk
  double clip_low = 0.5, clip_high = 1.05;
  double scale_low = 1e-4, scale_high = 1e4;
  int lr_tensor = 0;  // 4: float32, 8: float64
};

// A tensor's size, and its sample: the first `kept` of every `run` elements.
struct Size {
  int64_t numel;
  int run = 1, kept = 1;

  int64_t path_numel() const { return numel / run * kept; }
  int64_t element(int64_t path_element) const { return path_element / kept * run + path_element % kept; }
};

struct Setup {
  DType param = DType::kFloat32, grad = DType::kFloat32;
  Variant variant = Variant::kLocal;
  std::vector<Group> groups = {Group{}};
  std::vector<Size> sizes;
  bool misaligned = false;
  double grad_scale = 0.0;  // 0: none
  float found_inf = -1.0f;  // -1: none
  double grad_size = 1.0;
  uint64_t seed = 1;
};

struct Tensor {
  Tensor(const Setup& setup, const Size& shape, int group_index, const std::function<int()>& offset)
      : group(group_index),
        size(shape),
        param(setup.param, size.numel, offset()),
        grad(setup.grad, size.numel, offset()),
        exp_avg(DType::kFloat32, size.numel, offset()),
        exp_avg_sq(DType::kFloat32, size.numel, offset()),
        max_exp_avg_sq(DType::kFloat32, size.numel, offset()),
        path(DType::kFloat32, size.path_numel(), offset()),
        step(DType::kFloat32, 1, 0),
        lr_scale(DType::kFloat32, 1, 0) {}

  int group;
  Size size;
  Array param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, path, step, lr_scale;
  std::vector<Array> walk = {clara::kWalkScalars, Array(DType::kFloat32, 1, 0)};

  std::vector<const Array*> state() const {
    std::vector<const Array*> all = {&param, &exp_avg, &exp_avg_sq, &max_exp_avg_sq, &path, &step, &lr_scale};
    for (const Array& scalar : walk) all.push_back(&scalar);
    return all;
  }
  WalkState walk_state() const {
    return {static_cast<float>(walk[0].get(0)), static_cast<float>(walk[1].get(0)),
            static_cast<float>(walk[2].get(0)), static_cast<float>(walk[3].get(0)),
            static_cast<float>(walk[4].get(0)), static_cast<float>(walk[5].get(0)),
            static_cast<float>(walk[6].get(0))};
  }
};

class Optimizer {
 public:
  explicit Optimizer(const Setup& setup) : setup_(setup), random_(setup.seed) {
    const auto offset = [this] { return setup_.misaligned ? static_cast<int>(random_() % 5) : 0; };
    const int steps[] = {0, 0, 1, 7, 40, 300, 5000};
    for (size_t i = 0; i < setup.sizes.size(); ++i) {
      tensors_.push_back(std::make_unique<Tensor>(setup, setup.sizes[i], static_cast<int>(i % setup.groups.size()),
                                                  offset));
      Tensor& t = *tensors_.back();
      t.step.set(0, steps[random_() % std::size(steps)]);
      t.lr_scale.set(0, setup.variant == Variant::kGlobal ? 1.0 : uniform(0.5, 2.0));
      const bool has_walk = random_() % 4 != 0;
      for (size_t k = 0; k < 4; ++k) t.walk[k].set(0, has_walk ? uniform(0.1, 2.0) : 0.0);
      for (size_t k = 4; k < t.walk.size(); ++k) t.walk[k].set(0, uniform(k == 5 ? 0.0 : -1.0, 1.0));  // cosines
      for (int64_t k = 0; k < t.param.count(); ++k) {
        t.param.set(k, uniform(-1.0, 1.0));
        t.exp_avg.set(k, uniform(-0.1, 0.1));
        t.exp_avg_sq.set(k, uniform(0.0, 0.1));
        t.max_exp_avg_sq.set(k, uniform(0.0, 0.1));
      }
      for (int64_t k = 0; k < t.path.count(); ++k) t.path.set(k, uniform(-1.0, 1.0));
    }
    for (const Group& group : setup.groups) lr_tensors_.push_back({static_cast<float>(group.lr), group.lr});
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
    list_.grads = grads_.data();
    list_.groups = groups_.data();
    list_.group_count = static_cast<int64_t>(groups_.size());
    list_.grad_scale = setup_.grad_scale != 0.0 ? &grad_scale_ : nullptr;
    list_.found_inf = setup_.found_inf >= 0.0f ? &found_inf_ : nullptr;
    list_.param_dtype = setup_.param;
    list_.grad_dtype = setup_.grad;
    list_.one_scale = setup_.variant == Variant::kGlobal;
    return list_;
  }

  const GroupOptions& options_of(const Tensor& t) const { return groups_[static_cast<size_t>(t.group)]; }

  // What the chunks of a tensor left behind in the last step, added up here.
  PathSums sums_of(size_t i) {
    const size_t row = reversed_ ? tensors_.size() - 1 - i : i;
    const auto offsets = clara::cuda::layout(list_);
    const auto* parts = reinterpret_cast<const ElementSums<float>*>(memory_.data() + offsets.partial_sums);
    const Size& size = tensors_[i]->size;
    PathSums sums{};
    sums.numel = static_cast<double>(size.numel);
    const double weight = static_cast<double>(size.run) / size.kept;
    const int64_t first = records_[row].first_path_chunk;
    for (int64_t chunk = first; chunk * kPathChunk < first * kPathChunk + size.path_numel(); ++chunk) {
      for (int i = 0; i < clara::kSums; ++i) columns(sums)[i] += weight * parts[chunk].columns[i];
    }
    sums.weight_sq *= weight;
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
    o.adapt_lr = group.adapt_lr;
    o.beta1 = group.beta1;
    o.beta2 = group.beta2;
    o.log_beta1 = std::log(group.beta1);
    o.log_beta2 = std::log(group.beta2);
    o.eps = group.eps;
    o.weight_decay = group.weight_decay;
    o.smoothing = group.smoothing;
    o.damping = group.damping;
    o.reference = group.reference;
    o.clip_low = group.clip_low;
    o.clip_high = group.clip_high;
    o.lr_smoothing = setup_.variant == Variant::kSmoothed ? 0.9 : 0.0;
    o.scale_low = group.scale_low;
    o.scale_high = group.scale_high;
    return o;
  }

  void describe() {
    records_.clear();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Tensor& t = ordered(i);
      clara::TensorRecord record{};
      record.param = t.param.data();
      record.exp_avg = t.exp_avg.data();
      record.exp_avg_sq = t.exp_avg_sq.data();
      record.max_exp_avg_sq = setup_.groups[static_cast<size_t>(t.group)].amsgrad ? t.max_exp_avg_sq.data() : nullptr;
      record.path = t.path.data();
      record.step = static_cast<float*>(t.step.data());
      record.lr_scale = static_cast<float*>(scale_of(t).data());
      for (size_t k = 0; k < t.walk.size(); ++k) record.walk[k] = static_cast<float*>(t.walk[k].data());
      record.numel = t.size.numel;
      record.group = t.group;
      record.run = t.size.run;
      record.kept = t.size.kept;
      records_.push_back(record);
    }
    list_.tensors = records_.data();
    list_.count = static_cast<int64_t>(records_.size());
    clara::cuda::number_chunks(list_, records_.data());
    grads_.resize(tensors_.size());
    groups_.resize(setup_.groups.size());
    const auto offsets = clara::cuda::layout(list_);
    memory_.assign(static_cast<size_t>(offsets.bytes), '\xff');  // scratch has no initial value
    clara::cuda::write_table(list_, memory_.data());
  }

  struct LrTensor {
    float single;
    double twice;
  };

  Setup setup_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
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

// An element in the step that follows `before`, with the sizes of what cancels in it: what errors are relative to.
struct Element {
  double grad, grad_size, m, m_size, v, v_size, max_v, d, d_before, u, u_tolerance;
};

Element element_after(const Setup& setup, const Tensor& before, int64_t k) {
  const Group& g = setup.groups[static_cast<size_t>(before.group)];
  const double t = before.step.get(0) + 1.0;
  const double bias1 = 1.0 - std::pow(g.beta1, t), bias2 = 1.0 - std::pow(g.beta2, t);
  Element e{};
  e.grad = before.grad.get(k);
  if (setup.grad_scale != 0.0) e.grad /= setup.grad_scale;
  if (g.maximize) e.grad = -e.grad;
  const double coupled = g.decoupled ? 0.0 : g.weight_decay * before.param.get(k);
  e.grad_size = std::fabs(e.grad) + std::fabs(coupled);
  e.grad += coupled;

  e.m = g.beta1 * before.exp_avg.get(k) + (1.0 - g.beta1) * e.grad;
  e.m_size = std::fabs(g.beta1 * before.exp_avg.get(k)) + (1.0 - g.beta1) * e.grad_size;
  e.v = g.beta2 * before.exp_avg_sq.get(k) + (1.0 - g.beta2) * e.grad * e.grad;
  e.v_size = g.beta2 * before.exp_avg_sq.get(k) + (1.0 - g.beta2) * e.grad_size * e.grad_size;
  e.max_v = e.v;
  if (g.amsgrad) e.max_v = std::isnan(e.v) ? e.v : std::max(before.max_exp_avg_sq.get(k), e.v);
  e.d = std::sqrt(e.max_v / bias2) + g.eps;
  e.d_before = std::sqrt((g.amsgrad ? before.max_exp_avg_sq : before.exp_avg_sq).get(k) / bias2) + g.eps;
  e.u = e.m / bias1 / e.d;
  e.u_tolerance = 4e-6 * (e.m_size / bias1 / e.d) + 1e-40;
  return e;
}

// Path and sums of a tensor.
void check_measured(const Setup& setup, const Tensor& before, const Tensor& after, const PathSums& sums,
                    size_t index) {
  const Group& g = setup.groups[static_cast<size_t>(after.group)];
  const double q = 1.0 - g.smoothing, s = std::sqrt(g.smoothing * (2.0 - g.smoothing));
  PathSums want{}, tolerance{};
  clara::MeasureCoefficients<double> coefficients{};
  coefficients.in_adams_metric = g.reference == 0.0;
  coefficients.adam.beta1 = g.beta1;
  coefficients.adam.one_minus_beta1 = 1.0 - g.beta1;
  coefficients.adam.inverse_bias1 = 1.0 / (1.0 - std::pow(g.beta1, before.step.get(0) + 1.0));
  coefficients.walk_moment_sq = before.walk_state().moment_sq;
  const double weight = static_cast<double>(after.size.run) / after.size.kept;
  for (int64_t p = 0; p < after.path.count(); ++p) {
    const Place where = {index, p};
    const Element e = element_after(setup, before, after.size.element(p));
    const double path_before = before.path.get(p), path = after.path.get(p);
    const double path_size = std::fabs(q * path_before) + std::fabs(s * e.u);
    if (g.lr == 0.0) {
      REQUIRE(path == path_before);
    } else {
      require_close(path, q * path_before + s * e.u, s * e.u_tolerance + 4e-7 * path_size, where, "path");
    }
    const auto add = [](PathSums& to, const ElementSums<double>& of_element, double factor) {
      for (int i = 0; i < clara::kSums; ++i) columns(to)[i] += factor * of_element.columns[i];
    };
    const double m_before = before.exp_avg.get(after.size.element(p));
    add(want, clara::element_sums(path_before, path, m_before, e.m, e.grad, e.d_before, e.d, coefficients), weight);
    const double path_bound = std::max(std::fabs(path_before), std::fabs(path));
    ElementSums<double> bound =
        clara::element_sums(path_bound, path_bound, m_before, e.m_size, e.grad_size, e.d_before, e.d, coefficients);
    // What is subtracted in it is of either sign: the sum of what it is made of.
    const double kept = g.beta1 * std::fabs(m_before) / e.d, gained = (1.0 - g.beta1) * e.grad_size;
    const double parts = kept * kept * coefficients.walk_moment_sq + gained / e.d * gained / e.d +
                         2.0 * kept * gained * (1.0 / e.d + 1.0 / std::max({e.d_before, std::fabs(m_before), 1e-30}));
    bound.columns[4] = bound.columns[6] * parts;  // of walk_moment_sq, and weight
    add(tolerance, bound, 1e-5 * weight);
  }
  want.weight_sq *= weight;
  tolerance.weight_sq *= weight;
  const char* const names[clara::kSums] = {"path_sq",        "step_sq",   "grad_sq", "path_before_sq",
                                           "walk_moment_sq", "path_grad", "weight",  "weight_sq"};
  for (int i = 0; i < clara::kSums; ++i) {
    require_close(columns(sums)[i], columns(want)[i], columns(tolerance)[i], {index}, names[i]);
  }
  REQUIRE(sums.numel == static_cast<double>(after.size.numel));
}

// Step and walk of a tensor; returns its evidence.
Evidence check_advanced(const GroupOptions& options, const Tensor& before, const Tensor& after, const PathSums& sums,
                        size_t index) {
  REQUIRE(after.step.get(0) == before.step.get(0) + 1.0);
  const WalkState want = clara::advanced_walk(before.walk_state(), sums, options, after.step.get(0));
  const WalkState got = after.walk_state();
  require_close(got.moment_sq, want.moment_sq, 1e-6 * want.moment_sq, {index}, "walk_moment_sq");
  require_close(got.path_moment, want.path_moment, 1e-6 * want.path_moment, {index}, "walk_path_moment");
  require_close(got.path_sq, want.path_sq, 1e-6 * want.path_sq, {index}, "walk_path_sq");
  require_close(got.grad_peak, want.grad_peak, 1e-6 * want.grad_peak, {index}, "walk_grad_peak");
  require_close(got.cosine, want.cosine, 1e-6, {index}, "walk_cosine");
  require_close(got.cosine_sq, want.cosine_sq, 1e-6, {index}, "walk_cosine_sq");
  require_close(got.cosine_lag, want.cosine_lag, 1e-6, {index}, "walk_cosine_lag");
  return clara::evidence_of(sums, got, options);
}

Evidence total_of(std::vector<Evidence> all) {
  Evidence total{};
  for (Evidence& evidence : all) {
    for (int i = 0; i < clara::kEvidence; ++i) columns(total)[i] += columns(evidence)[i];
  }
  return total;
}

void check_rescaled(Optimizer& optimizer, const Before& before, size_t i, const Evidence& evidence) {
  Tensor& t = optimizer.tensor(i);
  const double scale =
      clara::adapted_scale(static_cast<float>(before.scales[i]), evidence, optimizer.options_of(t));
  require_close(optimizer.scale_of(t).get(0), scale, 2e-7 * scale, {i}, "lr_scale");
}

// Moments and parameters of a tensor.
void check_updated(const Setup& setup, const Tensor& before, const Tensor& after, double scale, size_t index) {
  const Group& g = setup.groups[static_cast<size_t>(after.group)];
  const Precision rounding = precision_of(setup.param);
  for (int64_t k = 0; k < after.size.numel; ++k) {
    const Place where = {index, k};
    const Element e = element_after(setup, before, k);
    require_close(after.exp_avg.get(k), e.m, 4e-7 * e.m_size + 1e-44, where, "exp_avg");
    require_close(after.exp_avg_sq.get(k), e.v, 1e-6 * e.v_size + 1e-44, where, "exp_avg_sq");
    if (g.amsgrad) {
      require_close(after.max_exp_avg_sq.get(k), e.max_v, 1e-6 * (e.v_size + e.max_v), where, "max_exp_avg_sq");
    }
    const double theta = before.param.get(k);
    const double decay = g.decoupled ? g.weight_decay * theta : 0.0;
    const double want = theta - g.lr * scale * (e.u + decay);
    const double step_size = g.lr * scale * (std::fabs(e.u) + std::fabs(decay));
    const double tolerance = g.lr * scale * e.u_tolerance + 1e-6 * step_size + 2e-7 * (std::fabs(theta) + step_size) +
                             rounding.relative * std::fabs(want) + rounding.absolute;
    require_close(after.param.get(k), want, tolerance, where, "param");
  }
  for (const Array* array : after.state()) REQUIRE(array->guard_intact());
}

// Takes a step and checks all of it.
void checked_step(Optimizer& optimizer, int max_launches = 3) {
  const Setup& setup = optimizer.setup();
  const Before before(optimizer);
  const int launches = emulation::runtime.launches;
  clara::cuda::step(optimizer.list(), optimizer.placement());
  REQUIRE(emulation::runtime.launches - launches <= max_launches);
  REQUIRE(emulation::runtime.last_launch_device == 1 && emulation::runtime.device == 0);
  REQUIRE(emulation::runtime.last_launch_stream == optimizer.placement().stream);

  std::vector<Evidence> evidence;
  for (size_t i = 0; i < optimizer.tensors().size(); ++i) {
    Tensor& after = optimizer.tensor(i);
    const PathSums sums = optimizer.sums_of(i);
    check_measured(setup, before.tensors[i], after, sums, i);
    evidence.push_back(check_advanced(optimizer.options_of(after), before.tensors[i], after, sums, i));
  }
  const Evidence total = total_of(evidence);
  for (size_t i = 0; i < optimizer.tensors().size(); ++i) {
    Tensor& after = optimizer.tensor(i);
    check_rescaled(optimizer, before, i, setup.variant == Variant::kGlobal ? total : evidence[i]);
    check_updated(setup, before.tensors[i], after, optimizer.scale_of(after).get(0), i);
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

// Around the borders of a vector (4), a warp's and a block's run of vectors (128, 1024) and a chunk; then samples, with
// runs of vectors and without, of more than one chunk and of less than a vector.
const std::vector<Size> kBorderSizes = {
    {0},    {1},    {2},    {3},    {4},    {5},    {7},          {8},      {9},          {127},
    {128},  {129},  {0},    {1023}, {1024}, {1025}, {1027},       {2047},   {2049},       {3071},
    {kPathChunk - 1}, {kPathChunk + 1}, {kChunk - 1}, {kChunk}, {kChunk + 1}, {2 * kChunk + 3},
    {64 * 37, 64, 4}, {64, 64, 4}, {64, 64, 1}, {128 * 9, 128, 2}, {1024 * 3, 1024, 64}, {64 * 129, 64, 32},
    {64 * (kPathChunk / 4 + 3), 64, 4}, {0, 64, 4}};
const std::vector<Size> kFewSizes = {{5}, {0}, {130}, {1026}, {kPathChunk + 6}, {64 * 70, 64, 4}, {64 * 70, 64, 2}};

struct Storage {
  DType param, grad;
};
const std::vector<Storage> kStorage = {{DType::kFloat32, DType::kFloat32},
                                       {DType::kBFloat16, DType::kBFloat16},
                                       {DType::kBFloat16, DType::kFloat32},
                                       {DType::kFloat16, DType::kFloat16},
                                       {DType::kFloat16, DType::kFloat32}};

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
    {"no-lr", [](Setup& s) { only(s).lr = 0.0; }},
    {"fixed-reference", [](Setup& s) { only(s).reference = 1.0; }},
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
    g.lr = i % 7 == 6 ? 0.0 : 0.001 * (1 + i % 17);
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
    Setup setup;
    setup.sizes = kFewSizes;
    setup.variant = variant;
    setup.grad_scale = 8.0;
    setup.found_inf = 1.0f;
    Optimizer optimizer(setup);
    const auto& list = optimizer.list();
    std::vector<PathSums> sums(setup.sizes.size());
    std::vector<Evidence> evidence(setup.sizes.size(), Evidence{1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0});
    require_unchanged_by(optimizer, [&] { clara::cuda::step(list, optimizer.placement()); });
    require_unchanged_by(optimizer, [&] {
      clara::cuda::measure(list, sums.data(), optimizer.placement());
      clara::cuda::adapt(list, sums.data(), evidence.data(), optimizer.placement());
      clara::cuda::update(list, optimizer.placement());
    });
    optimizer.setup().found_inf = 0.0f;
    checked_step(optimizer);
  }
}

void non_finite_and_zero_gradients() {
  for (Variant variant : kVariants) {
    Setup setup;
    setup.sizes = {{6}, {2000}, {3}};
    setup.variant = variant;
    Optimizer optimizer(setup);
    optimizer.tensor(1).grad.set(1999, std::numeric_limits<double>::quiet_NaN());
    optimizer.tensor(2).grad.set(1, std::numeric_limits<double>::infinity());
    const WalkState walk = optimizer.tensor(1).walk_state();
    const double scale = optimizer.scale_of(optimizer.tensor(1)).get(0);
    checked_step(optimizer);
    REQUIRE(std::fabs(optimizer.scale_of(optimizer.tensor(1)).get(0) - scale) <= 1e-7 * scale);
    REQUIRE(optimizer.tensor(1).walk_state().path_sq == walk.path_sq);

    setup.grad_size = 0.0;
    Optimizer resting(setup);
    const double before = resting.scale_of(resting.tensor(0)).get(0);
    checked_step(resting);
    REQUIRE(resting.scale_of(resting.tensor(0)).get(0) == before);
  }
}

// Sums and evidence that were completed elsewhere (over ranks and buckets).
void verbs_one_by_one() {
  for (Variant variant : kVariants) {
    Setup setup;
    setup.sizes = kBorderSizes;
    setup.variant = variant;
    setup.groups = various_groups(3, variant);
    Optimizer optimizer(setup);
    const Before before(optimizer);
    const auto& list = optimizer.list();
    const size_t count = setup.sizes.size();
    std::vector<PathSums> sums(count);
    clara::cuda::measure(list, sums.data(), optimizer.placement());
    for (size_t i = 0; i < count; ++i) {
      const Tensor &old = before.tensors[i], &t = optimizer.tensor(i);
      check_measured(setup, old, t, sums[i], i);
      REQUIRE(t.step.get(0) == old.step.get(0) && t.exp_avg.memory() == old.exp_avg.memory());
      REQUIRE(t.exp_avg_sq.memory() == old.exp_avg_sq.memory() && t.param.memory() == old.param.memory());
      REQUIRE(t.max_exp_avg_sq.memory() == old.max_exp_avg_sq.memory());
      for (size_t k = 0; k < t.walk.size(); ++k) REQUIRE(t.walk[k].memory() == old.walk[k].memory());
      sums[i].path_sq *= 1.5;
      sums[i].step_sq *= 1.25;
      sums[i].numel += 3.0;
    }

    std::vector<Evidence> evidence(count);
    const bool global = variant == Variant::kGlobal;
    clara::cuda::adapt(list, sums.data(), evidence.data(), optimizer.placement());
    for (size_t i = 0; i < count; ++i) {
      Tensor& t = optimizer.tensor(i);
      Evidence want = check_advanced(optimizer.options_of(t), before.tensors[i], t, sums[i], i);
      for (int k = 0; k < clara::kEvidence; ++k) {
        require_close(columns(evidence[i])[k], columns(want)[k], 1e-12 * std::fabs(columns(want)[k]), {i}, "evidence");
      }
      if (global) {
        REQUIRE(optimizer.scale_of(t).get(0) == before.scales[i]);
      } else {
        check_rescaled(optimizer, before, i, evidence[i]);
      }
    }

    clara::cuda::update(list, optimizer.placement());
    for (size_t i = 0; i < count; ++i) {
      check_updated(setup, before.tensors[i], optimizer.tensor(i), optimizer.scale_of(optimizer.tensor(i)).get(0), i);
    }
  }
}

// Bitwise, for any order of blocks and of tensors.
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

// The sums of single tensors, which alignment must not change.
void same_sums_at_any_alignment() {
  std::vector<std::vector<double>> all;
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
    all.emplace_back();
    for (size_t i = 0; i < optimizer.tensors().size(); ++i) {
      const PathSums sums = optimizer.sums_of(i);
      all.back().insert(all.back().end(), {sums.path_sq, sums.step_sq, sums.grad_sq, sums.path_before_sq,
                                           sums.walk_moment_sq, sums.path_grad, sums.weight, sums.weight_sq});
    }
  }
  REQUIRE(all[0] == all[1]);
}

// ---------------------------------------------------------------------------------------------------------------
// Bytes
// ---------------------------------------------------------------------------------------------------------------

struct Moved {
  int64_t loaded, stored, accesses;
};

Moved moved_by(const std::function<void()>& operation) {
  emulation::Traffic& traffic = emulation::traffic;
  traffic.loads.reset();
  traffic.stores.reset();
  operation();
  return {traffic.loads.bytes, traffic.stores.bytes, traffic.loads.accesses + traffic.stores.accesses};
}

// Every byte of a tensor that a step has to move is moved once, and in accesses that are as wide as they can be: four
// elements where the stream is aligned.
void moves_no_byte_twice() {
  struct Options {
    bool amsgrad, coupled_decay, moves;
  };
  for (const Storage& storage : kStorage) {
    for (const Options& options : {Options{false, false, true}, Options{true, false, true}, Options{false, true, true},
                                   Options{true, true, true}, Options{false, false, false}}) {
      for (const Size& size : {Size{kChunk}, Size{1024 * 24, 1024, 64}, Size{64 * 70, 64, 4}, Size{64 * 70, 64, 2},
                               Size{kChunk + 1021}}) {
        for (bool misaligned : {false, true}) {
          Setup setup;
          setup.param = storage.param;
          setup.grad = storage.grad;
          setup.sizes = {size};
          setup.misaligned = misaligned;
          only(setup).amsgrad = options.amsgrad;
          only(setup).weight_decay = options.coupled_decay ? 0.1 : 0.0;
          only(setup).lr = options.moves ? 0.01 : 0.0;
          Optimizer optimizer(setup);
          const auto& list = optimizer.list();
          PathSums sums;
          const Moved measured =
              moved_by([&] { clara::cuda::measure(list, &sums, optimizer.placement()); });
          const Moved updated = moved_by([&] { clara::cuda::update(list, optimizer.placement()); });

          const int64_t n = size.numel, sampled = size.path_numel();
          const int64_t param = static_cast<int64_t>(bytes_of(storage.param));
          const int64_t grad = static_cast<int64_t>(bytes_of(storage.grad));
          const int64_t maximum = options.amsgrad ? 4 : 0;
          REQUIRE(measured.loaded == sampled * (grad + 4 + 4 + maximum + 4 + (options.coupled_decay ? param : 0)));
          REQUIRE(measured.stored == sampled * (options.moves ? 4 : 0));
          REQUIRE(updated.loaded == n * (grad + 4 + 4 + maximum + param));
          REQUIRE(updated.stored == n * (4 + 4 + maximum + param));
          if (options.moves && !options.amsgrad && !options.coupled_decay && storage.param == DType::kFloat32) {
            REQUIRE(measured.loaded + measured.stored == 20 * sampled);
            REQUIRE(updated.loaded + updated.stored == 28 * n);
          }
          const int64_t update_streams = 4 + 3 + (options.amsgrad ? 2 : 0);
          const int64_t measure_streams =
              4 + (options.moves ? 1 : 0) + (options.amsgrad ? 1 : 0) + (options.coupled_decay ? 1 : 0);
          if (!misaligned) {
            REQUIRE(updated.accesses == update_streams * (n / 4 + n % 4));
            const bool vectors = size.run == 1 || size.kept >= 4;
            REQUIRE(measured.accesses == measure_streams * (vectors ? sampled / 4 + sampled % 4 : sampled));
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------

int launches_of(const std::function<void()>& operation) {
  const int before = emulation::runtime.launches;
  operation();
  return emulation::runtime.launches - before;
}

void launches_do_not_grow_with_tensors() {
  for (int64_t count : {1, 400, 3000}) {
    Setup setup;
    setup.variant = Variant::kGlobal;
    setup.groups = various_groups(40, setup.variant);
    setup.sizes.assign(static_cast<size_t>(count), {1});
    Optimizer optimizer(setup);
    const auto& list = optimizer.list();
    const auto where = optimizer.placement();
    std::vector<PathSums> sums(static_cast<size_t>(count));
    std::vector<Evidence> evidence(static_cast<size_t>(count));
    REQUIRE(launches_of([&] { clara::cuda::step(list, where); }) == 3);
    if (count == 3000) break;  // takes long here
    REQUIRE(launches_of([&] { clara::cuda::measure(list, sums.data(), where); }) == 2);
    REQUIRE(launches_of([&] { clara::cuda::adapt(list, sums.data(), evidence.data(), where); }) == 1);
    REQUIRE(launches_of([&] { clara::cuda::update(list, where); }) == 1);
  }
}

// Lists that are cut into several launches: by tensors, and by groups.
void more_than_one_launch_holds() {
  struct Many {
    int tensors, groups;
  };
  for (Variant variant : {Variant::kGlobal, Variant::kSmoothed}) {
    for (Many many : {Many{4200, 2}, Many{400, 400}}) {
      Setup setup;
      setup.variant = variant;
      setup.groups = various_groups(many.groups, variant);
      for (int i = 0; i < many.tensors; ++i) setup.sizes.push_back({i % 4});
      Optimizer optimizer(setup);
      checked_step(optimizer, /*max_launches=*/20);
    }
  }
}

void no_tensors_no_launches() {
  Setup setup;
  Optimizer optimizer(setup);
  REQUIRE(launches_of([&] { clara::cuda::step(optimizer.list(), optimizer.placement()); }) == 0);
  setup.sizes = {{0}, {0}};
  Optimizer empty(setup);
  checked_step(empty);  // counts steps all the same
}

void tables_are_told_apart() {
  Setup setup;
  setup.sizes = {{5}, {64 * 70, 64, 4}};
  Optimizer optimizer(setup);
  auto list = optimizer.list();
  const auto offsets = clara::cuda::layout(list);
  std::vector<int64_t> table(static_cast<size_t>(offsets.table_bytes + 7) / 8);
  clara::cuda::write_table(list, table.data());
  std::vector<clara::TensorRecord> records(list.tensors, list.tensors + list.count);
  list.tensors = records.data();
  REQUIRE(clara::cuda::is_table_of(list, table.data()));
  records[1].kept = 2;
  REQUIRE(!clara::cuda::is_table_of(list, table.data()));
  records[1].kept = 4;
  records[0].path = records[1].path;
  REQUIRE(!clara::cuda::is_table_of(list, table.data()));
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
  for (const Storage& storage : kStorage) {
    const std::string types = std::string(name_of(storage.param)) + "-" + name_of(storage.grad);
    for (Variant variant : kVariants) {
      Setup base;
      base.param = storage.param;
      base.grad = storage.grad;
      base.variant = variant;
      const std::string name = types + "/" + name_of(variant) + "/";
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
        setup.groups = various_groups(7, variant);
        tests.push_back({"borders/" + name + (misaligned ? "misaligned" : "aligned"), [setup] { checked_steps(setup, 2); }});
      }
    }
  }
  tests.push_back({"infinite gradients change nothing", infinite_gradients_change_nothing});
  tests.push_back({"non-finite and zero gradients", non_finite_and_zero_gradients});
  tests.push_back({"verbs one by one", verbs_one_by_one});
  tests.push_back({"same bits in any order", same_bits_in_any_order});
  tests.push_back({"same sums at any alignment", same_sums_at_any_alignment});
  tests.push_back({"moves no byte twice", moves_no_byte_twice});
  tests.push_back({"launches do not grow with tensors", launches_do_not_grow_with_tensors});
  tests.push_back({"more than one launch holds", more_than_one_launch_holds});
  tests.push_back({"no tensors, no launches", no_tensors_no_launches});
  tests.push_back({"tables are told apart", tables_are_told_apart});
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
