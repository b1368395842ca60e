// The CPU core without Python or torch, for the sanitizers: exact heap blocks, so that a read or write outside of a
// tensor is caught; odd thread counts; every combination of storage types, sizes around vector, line and chunk borders,
// samples of every width. What is expected is computed here, element by element in double, from docs/algorithm.md and
// not from adam_clara.h. Exits with 1 and says what differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/cpu_backend.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/storage.h"
#include "../../csrc/cpu/team.h"

using namespace clara;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
  return kNames[static_cast<int>(dtype)];
}

// ---------------------------------------------------------------------------------------------------------------
// Elements: the test's own conversions, one number at a time in double
// ---------------------------------------------------------------------------------------------------------------

double read(const char* at, DType dtype) {
  uint16_t half = 0;
  float single = 0.0f;
  double number = 0.0;
  switch (dtype) {
    case DType::kFloat64: std::memcpy(&number, at, 8); return number;
    case DType::kFloat32: std::memcpy(&single, at, 4); return single;
    case DType::kBFloat16: {
      std::memcpy(&half, at, 2);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(&single, &bits, 4);
      return single;
    }
    case DType::kFloat16: {
      std::memcpy(&half, at, 2);
      const int exponent = (half >> 10) & 31, mantissa = half & 1023;
      const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                               : exponent == 0 ? std::ldexp(mantissa, -24)
                                               : std::ldexp(1024 + mantissa, exponent - 25);
      return half & 0x8000 ? -magnitude : magnitude;
    }
  }
  return number;
}

// Values that every storage type holds exactly.
void write_exact(char* at, DType dtype, double value) {
  const float single = static_cast<float>(value);
  uint32_t bits = 0;
  std::memcpy(&bits, &single, 4);
  uint16_t half = 0;
  switch (dtype) {
    case DType::kFloat64: std::memcpy(at, &value, 8); return;
    case DType::kFloat32: std::memcpy(at, &single, 4); return;
    case DType::kBFloat16: half = static_cast<uint16_t>(bits >> 16); break;
    case DType::kFloat16:
      if (value != 0.0) {
        half = static_cast<uint16_t>(((bits >> 16) & 0x8000) | ((((bits >> 23) & 255) - 112) << 10) |
                                     ((bits >> 13) & 1023));
      }
      break;
  }
  std::memcpy(at, &half, 2);
}

// ---------------------------------------------------------------------------------------------------------------
// Tensors: blocks that end where the tensor ends, and start off the alignment of a vector
// ---------------------------------------------------------------------------------------------------------------

class Tensor {
 public:
  Tensor(int64_t numel, DType dtype) : dtype_(dtype), bytes_((static_cast<size_t>(numel) + 1) * size_of(dtype)) {
    block_.reset(new char[bytes_]);
    std::memset(block_.get(), 0, bytes_);
  }
  Tensor(const Tensor& other) : dtype_(other.dtype_), bytes_(other.bytes_), block_(new char[other.bytes_]) {
    std::memcpy(block_.get(), other.block_.get(), bytes_);
  }
  char* data() const { return block_.get() + size_of(dtype_); }
  double at(int64_t i) const { return read(data() + static_cast<size_t>(i) * size_of(dtype_), dtype_); }
  void set(int64_t i, double value) { write_exact(data() + static_cast<size_t>(i) * size_of(dtype_), dtype_, value); }
  bool same_bits(const Tensor& other) const { return std::memcmp(block_.get(), other.block_.get(), bytes_) == 0; }

 private:
  DType dtype_;
  size_t bytes_;
  std::unique_ptr<char[]> block_;
};

struct Size {
  int64_t numel;
  int32_t run = 1, kept = 1;

  int64_t path_numel() const { return numel / run * kept; }
  int64_t element_of(int64_t p) const { return p / kept * run + p % kept; }
};

std::vector<Size> sizes_of_every_kind() {
  return {{0}, {1}, {3}, {15}, {16}, {17}, {0}, {63}, {65}, {128}, {cpu::kPathChunk - 1}, {cpu::kPathChunk},
          {cpu::kPathChunk + 1}, {cpu::kChunk - 1}, {cpu::kChunk}, {cpu::kChunk + 1}, {2 * cpu::kChunk + 7}, {2},
          // Samples: pieces wider and narrower than a vector, a last vector that is not full, more than one chunk.
          {64 * 7, 64, 1}, {64 * 9, 64, 2}, {64 * 67, 64, 4}, {64 * 33, 64, 8}, {128 * 11, 128, 8}, {256 * 3, 256, 16},
          {512 * 5, 512, 32}, {1024 * 70, 1024, 64}, {1024 * 3, 1024, 128}, {1024 * 9, 1024, 512}, {64 * 1025, 64, 4}};
}

struct Case {
  DType param, grad;
  bool one_scale, amsgrad, coupled;

  std::string name() const {
    return std::string(name_of(param)) + "/" + name_of(grad) + (one_scale ? " one scale" : "") +
           (amsgrad ? " amsgrad" : "") + (coupled ? " coupled" : "");
  }
  DType moments() const { return param == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
};

constexpr double kLr = 0.01, kBeta1 = 0.9, kBeta2 = 0.99, kSmoothing = 0.2, kDamping = 0.5, kGradScale = 2.0;

struct Model {
  Case c;
  std::vector<Size> sizes;
  std::vector<Tensor> params, grads, m, v, v_max, paths;
  std::vector<float> steps, scales;
  std::vector<std::vector<float>> walks;
  GroupOptions options{};
  bool backwards = false;  // the list's order

  explicit Model(const Case& of, std::vector<Size> with_sizes = sizes_of_every_kind())
      : c(of), sizes(std::move(with_sizes)) {
    std::mt19937 random(7);
    for (const Size& size : sizes) {
      params.emplace_back(size.numel, c.param);
      grads.emplace_back(size.numel, c.grad);
      m.emplace_back(size.numel, c.moments());
      v.emplace_back(size.numel, c.moments());
      v_max.emplace_back(size.numel, c.moments());
      paths.emplace_back(size.path_numel(), c.moments());
      for (int64_t i = 0; i < size.numel; ++i) {
        params.back().set(i, std::ldexp(static_cast<int>(random() % 256) - 128, -6));
        // Odd multiples: never 0, which would make 0/0 of a step with eps = 0, as it does in torch.
        grads.back().set(i, std::ldexp(2 * static_cast<int>(random() % 32) - 19, -5));
      }
    }
    steps.assign(sizes.size(), 0.0f);
    scales.assign(c.one_scale ? 1 : sizes.size(), 1.0f);
    walks.assign(sizes.size(), std::vector<float>(kWalkScalars, 0.0f));
    options.lr = kLr;
    options.beta1 = kBeta1, options.beta2 = kBeta2;
    options.log_beta1 = std::log(kBeta1), options.log_beta2 = std::log(kBeta2);
    options.weight_decay = c.coupled ? 0.0307 : 0.0;
    options.smoothing = kSmoothing, options.damping = kDamping;
    options.reference = 0.7;  // unlike the excess, a rule that moves every tensor's scale
    options.clip_low = 0.5, options.clip_high = 1.5;
    options.lr_smoothing = 0.5;
    options.scale_low = 1e-4, options.scale_high = 1e4;
    options.adapt_lr = 1.0;
  }

  size_t scale_of(size_t tensor) const { return c.one_scale ? 0 : tensor; }

  void run(int steps_to_take, int threads, bool in_one_go, float found_inf = 0.0f) {
    std::vector<TensorRecord> records;
    std::vector<const void*> grad_pointers;
    for (size_t n = 0; n < sizes.size(); ++n) {
      const size_t i = backwards ? sizes.size() - 1 - n : n;
      TensorRecord record{};
      record.param = params[i].data();
      record.exp_avg = m[i].data();
      record.exp_avg_sq = v[i].data();
      record.max_exp_avg_sq = c.amsgrad ? v_max[i].data() : nullptr;
      record.path = paths[i].data();
      record.step = &steps[i];
      record.lr_scale = &scales[scale_of(i)];
      for (int k = 0; k < kWalkScalars; ++k) record.walk[k] = &walks[i][static_cast<size_t>(k)];
      record.numel = sizes[i].numel;
      record.run = sizes[i].run, record.kept = sizes[i].kept;
      records.push_back(record);
      grad_pointers.push_back(grads[i].data());
    }
    const auto count = static_cast<int64_t>(records.size());
    const float grad_scale = static_cast<float>(kGradScale);
    TensorList list{};
    list.tensors = records.data();
    list.count = count;
    list.grads = grad_pointers.data();
    list.groups = &options;
    list.group_count = 1;
    cpu::number_chunks(list, records.data());
    list.grad_scale = &grad_scale;
    list.found_inf = &found_inf;
    list.param_dtype = c.param, list.grad_dtype = c.grad;
    list.one_scale = c.one_scale;
    const cpu::Placement where{threads};
    sums.resize(records.size()), evidence.resize(records.size());
    for (int t = 0; t < steps_to_take; ++t) {
      if (in_one_go) {
        cpu::step(list, where);
        continue;
      }
      cpu::measure(list, sums.data(), where);
      cpu::adapt(list, sums.data(), evidence.data(), where);
      if (c.one_scale) {
        Evidence total{};
        for (const Evidence& e : evidence) {
          total.path_sq += e.path_sq, total.weight += e.weight, total.weight_sq += e.weight_sq;
          total.shared_weight += e.shared_weight;
        }
        if (found_inf == 0.0f) rescale_tensor(records[0], total, options);
      }
      cpu::update(list, where);
    }
  }

  // What (m/d)^2 of an element is expected to be after a step with this gradient and d.
  double expected_moment_sq(size_t t, int64_t i, double grad, double d, double bias2) const {
    const double was = m[t].at(i), kept = kBeta1 * was, gained = (1.0 - kBeta1) * grad;
    const double d_before = std::sqrt((c.amsgrad ? v_max : v)[t].at(i) / bias2) + options.eps;
    const double skew = was == 0.0 ? 0.0 : 2.0 * gained / d * kept * (1.0 / d - 1.0 / std::max(d_before, std::fabs(was)));
    return (walks[t][0] * kept * kept + gained * gained) / (d * d) + skew;
  }

  bool same_bits(const Model& other) const {
    const auto same = [](const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
      return std::equal(a.begin(), a.end(), b.begin(), [](const Tensor& x, const Tensor& y) { return x.same_bits(y); });
    };
    return same(params, other.params) && same(m, other.m) && same(v, other.v) && same(v_max, other.v_max) &&
           same(paths, other.paths) && steps == other.steps && scales == other.scales && walks == other.walks;
  }

  std::vector<PathSums> sums;  // of the last step that was not taken in one go
  std::vector<Evidence> evidence;
};

// ---------------------------------------------------------------------------------------------------------------
// What is expected
// ---------------------------------------------------------------------------------------------------------------

bool close(double a, double b, double unit, double least = 1e-6) {
  return std::fabs(a - b) <= unit * std::fabs(b) + least;
}

// One more step of `before`, as `after` has taken it by the verbs.
void check_step(const Model& before, const Model& after) {
  const Case& c = before.c;
  const double unit = c.param == DType::kBFloat16 ? 0x1p-8 : c.param == DType::kFloat16 ? 0x1p-11 : 1e-6;
  const double q = 1.0 - kSmoothing, s = std::sqrt(1.0 - q * q);
  double total_path_sq = 0.0, total_numel = 0.0;
  for (size_t t = 0; t < before.sizes.size(); ++t) {
    const Size& size = before.sizes[t];
    const std::string where = c.name() + ", tensor " + std::to_string(t) + ": ";
    const auto wrong = [&](const char* what, double got, double expected) {
      expect(false, where + what + " " + std::to_string(got) + " instead of " + std::to_string(expected));
    };
    const double step = before.steps[t] + 1.0;
    const double bias1 = 1.0 - std::pow(kBeta1, step), bias2 = 1.0 - std::pow(kBeta2, step);
    const auto moved = [&](int64_t i, double* grad, double* m, double* v, double* v_max, double* d) {
      *grad = before.grads[t].at(i) / kGradScale * (before.options.maximize != 0.0 ? -1.0 : 1.0) +
              (c.coupled ? 0.0307 * before.params[t].at(i) : 0.0);
      *m = kBeta1 * before.m[t].at(i) + (1.0 - kBeta1) * *grad;
      *v = kBeta2 * before.v[t].at(i) + (1.0 - kBeta2) * *grad * *grad;
      *v_max = std::max(before.v_max[t].at(i), *v);
      *d = std::sqrt((c.amsgrad ? *v_max : *v) / bias2) + before.options.eps;
    };
    double grad = 0, m = 0, v = 0, v_max = 0, d = 0;
    double path_sq = 0, step_sq = 0, grad_sq = 0, path_before_sq = 0, walk_moment_sq = 0, path_grad = 0;
    for (int64_t p = 0; p < size.path_numel(); ++p) {
      moved(size.element_of(p), &grad, &m, &v, &v_max, &d);
      const double u = m / bias1 / d, path = q * before.paths[t].at(p) + s * u;
      path_sq += path * path, step_sq += u * u, grad_sq += grad / d * grad / d;
      path_before_sq += before.paths[t].at(p) * before.paths[t].at(p);
      walk_moment_sq += before.expected_moment_sq(t, size.element_of(p), grad, d, bias2);
      path_grad += before.paths[t].at(p) * grad / d;
      if (!close(after.paths[t].at(p), path, 1e-5)) return wrong("path", after.paths[t].at(p), path);
    }
    const double weight = static_cast<double>(size.run) / size.kept;
    const PathSums& sums = after.sums[t];
    if (!close(sums.path_sq, weight * path_sq, 1e-5)) return wrong("path_sq", sums.path_sq, weight * path_sq);
    if (!close(sums.step_sq, weight * step_sq, 1e-5)) return wrong("step_sq", sums.step_sq, weight * step_sq);
    if (!close(sums.grad_sq, weight * grad_sq, 1e-5)) return wrong("grad_sq", sums.grad_sq, weight * grad_sq);
    if (!close(sums.path_before_sq, weight * path_before_sq, 1e-5)) {
      return wrong("path_before_sq", sums.path_before_sq, weight * path_before_sq);
    }
    // Without a path nobody asks for it; without eps it is 0 / 0 then.
    if (path_before_sq != 0.0 && !close(sums.walk_moment_sq, weight * walk_moment_sq, 1e-5)) {
      return wrong("walk_moment_sq", sums.walk_moment_sq, weight * walk_moment_sq);
    }
    const double cosine_unit = weight * std::sqrt(path_before_sq * grad_sq);
    if (!close(sums.path_grad, weight * path_grad, 0.0, 1e-5 * cosine_unit + 1e-6)) {
      return wrong("path_grad", sums.path_grad, weight * path_grad);
    }
    const double all = static_cast<double>(size.numel);
    expect(close(sums.weight, all, 1e-12) && close(sums.weight_sq, weight * all, 1e-12), where + "weights of 1");
    expect(sums.numel == all, where + "numel");

    // The walk: V / W, (C / n)^(1/2), P / N, M; the cosine, and the averages of its square and its product with the last.
    const std::vector<float>& walk = before.walks[t];
    const double a = s / bias1, was = sums.path_before_sq, is = sums.path_sq;
    const double length_sq = bias1 * bias1 * sums.step_sq;
    const double moment_sq =
        was == 0.0 ? length_sq : std::max(sums.walk_moment_sq, (1 - kBeta1) * (1 - kBeta1) * sums.grad_sq);
    const double product = std::min(kBeta1 * walk[1] * walk[1] * all, std::sqrt(walk[2] * was * moment_sq));
    const double path_moment = q * product + a * moment_sq;
    const double walk_sq = q * q * walk[2] * was + 2.0 * q * a * product + a * a * moment_sq;
    const double grad_peak = std::max(0.98 * walk[3], sums.grad_sq / sums.weight);
    const std::vector<float>& now = after.walks[t];
    expect(is == 0.0 || (close(now[0], moment_sq / length_sq, 1e-5) && close(now[1], std::sqrt(path_moment / all), 1e-5) &&
                         close(now[2], walk_sq / is, 1e-5) && close(now[3], grad_peak, 1e-5)),
           where + "walk");
    if (was != 0.0 && sums.grad_sq != 0.0) {
      const double x = sums.path_grad / std::sqrt(was * sums.grad_sq);
      expect(close(now[4], x, 0.0) && close(now[5], 0.9 * walk[5] + 0.1 * x * x, 0.0) &&
                 close(now[6], 0.9 * walk[6] + 0.1 * x * walk[4], 0.0),
             where + "cosines");
    } else {
      expect(std::equal(now.begin() + 4, now.end(), walk.begin() + 4), where + "cosines without an angle");
    }
    expect(is == 0.0 || (after.evidence[t].path_sq == is && close(after.evidence[t].walk_sq, walk_sq, 1e-5) &&
                         close(after.evidence[t].step_walk_sq, moment_sq / (bias1 * bias1), 1e-5)),
           where + "evidence");
    expect(after.steps[t] == before.steps[t] + 1.0f, where + "step not counted");
    total_path_sq += weight * path_sq, total_numel += static_cast<double>(size.numel);

    const auto scale = [&](double n, double numel) {
      const double factor = std::exp(kSmoothing / (2.0 * kDamping) * (n / (numel * 0.7) - 1.0));
      const double mu = before.scales[before.scale_of(t)];
      return 0.5 * mu + 0.5 * mu * std::min(std::max(factor, 0.5), 1.5);
    };
    const double mu = after.scales[after.scale_of(t)];
    if (!c.one_scale && size.numel > 0) {
      const double expected = scale(weight * path_sq, static_cast<double>(size.numel));
      if (!close(mu, expected, 1e-5)) return wrong("scale", mu, expected);
    }
    if (c.one_scale && t + 1 == before.sizes.size()) {
      const double expected = scale(total_path_sq, total_numel);
      if (!close(mu, expected, 1e-5)) return wrong("scale", mu, expected);
    }

    for (int64_t i = 0; i < size.numel; ++i) {
      moved(i, &grad, &m, &v, &v_max, &d);
      const double param = before.params[t].at(i), decay = c.coupled ? 0.0 : before.options.weight_decay;
      const double expected = param - kLr * mu * (m / bias1 / d + decay * param);
      if (!close(after.m[t].at(i), m, 1e-5)) return wrong("first moment", after.m[t].at(i), m);
      if (!close(after.v[t].at(i), v, 1e-5)) return wrong("second moment", after.v[t].at(i), v);
      if (c.amsgrad && !close(after.v_max[t].at(i), v_max, 1e-5)) return wrong("maximum", after.v_max[t].at(i), v_max);
      if (!close(after.params[t].at(i), expected, unit)) return wrong("parameter", after.params[t].at(i), expected);
    }
  }
}

void check(const Case& c) {
  Model model(c);
  model.options.eps = c.amsgrad ? 1e-3 : 0.0;
  model.options.maximize = c.amsgrad;
  if (!c.coupled) model.options.weight_decay = 0.1, model.options.decoupled_weight_decay = 1.0;
  Model once = model, backwards = model;
  for (int step = 0; step < 2; ++step) {
    Model after(model);
    after.run(1, 3, false);
    check_step(model, after);
    model = std::move(after);
  }
  once.run(2, 1, true);
  if (!c.one_scale) expect(model.same_bits(once), c.name() + ": the verbs differ from the whole step");
  backwards.backwards = true;
  Model threads(backwards), skipped(once);
  threads.backwards = false;
  threads.run(2, 3, true);
  expect(threads.same_bits(once), c.name() + ": differs with 3 threads");
  backwards.run(2, 2, true);
  expect(backwards.same_bits(once), c.name() + ": differs with the tensors in another order");
  skipped.run(1, 3, true, 1.0f);
  skipped.run(1, 3, false, 1.0f);
  expect(skipped.same_bits(once), c.name() + ": changed in spite of found_inf");
}

// ---------------------------------------------------------------------------------------------------------------
// Single properties
// ---------------------------------------------------------------------------------------------------------------

const Case kPlain{DType::kFloat32, DType::kFloat32, false, false, false};

// The walk as reference: sums are weighted with d.
void check_metric() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    Model before({dtype, dtype, false, false, false});
    before.options.reference = 0.0;
    before.run(1, 1, true);
    Model after(before);
    after.run(1, 2, false);
    for (size_t t = 0; t < before.sizes.size(); ++t) {
      const Size& size = before.sizes[t];
      PathSums expected{};
      expected.numel = static_cast<double>(size.numel);
      for (int64_t p = 0; p < size.path_numel(); ++p) {
        const int64_t i = size.element_of(p);
        const double all = static_cast<double>(size.run) / size.kept;
        const double d = std::sqrt(after.v[t].at(i) / (1.0 - kBeta2 * kBeta2));
        const double u = after.m[t].at(i) / (1.0 - kBeta1 * kBeta1) / d, grad = after.grads[t].at(i) / kGradScale;
        expected.path_sq += all * d * after.paths[t].at(p) * after.paths[t].at(p);
        expected.step_sq += all * d * u * u;
        expected.grad_sq += all * grad * grad / d;
        expected.path_before_sq += all * d * before.paths[t].at(p) * before.paths[t].at(p);
        expected.walk_moment_sq += all * d * before.expected_moment_sq(t, i, grad, d, 1.0 - kBeta2 * kBeta2);
        expected.path_grad += all * before.paths[t].at(p) * grad;
        expected.weight += all * d;
        expected.weight_sq += all * d * all * d;
      }
      const PathSums& sums = after.sums[t];
      expect(close(sums.path_sq, expected.path_sq, 1e-5) && close(sums.step_sq, expected.step_sq, 1e-5) &&
                 close(sums.grad_sq, expected.grad_sq, 1e-5) && close(sums.weight, expected.weight, 1e-5) &&
                 close(sums.weight_sq, expected.weight_sq, 1e-5) &&
                 close(sums.path_before_sq, expected.path_before_sq, 1e-5) &&
                 close(sums.walk_moment_sq, expected.walk_moment_sq, 1e-5) && sums.numel == expected.numel &&
                 close(sums.path_grad, expected.path_grad, 0.0,
                       1e-5 * std::sqrt(expected.path_before_sq * expected.grad_sq)),
             std::string(name_of(dtype)) + ": sums in Adam's metric of tensor " + std::to_string(t));
    }
  }
}

void check_lr_zero() {
  Model model(kPlain);
  model.run(1, 2, true);
  Model frozen(model);
  frozen.options.lr = 0.0;
  frozen.run(1, 2, true);
  for (size_t t = 0; t < model.sizes.size(); ++t) {
    const std::string where = "lr = 0, tensor " + std::to_string(t) + ": ";
    expect(frozen.params[t].same_bits(model.params[t]), where + "parameter moved");
    expect(frozen.paths[t].same_bits(model.paths[t]), where + "path moved");
    expect(frozen.scales[t] == model.scales[t] && frozen.walks[t][2] == model.walks[t][2], where + "voted");
    expect(frozen.steps[t] == 2.0f, where + "step not counted");
    expect(model.sizes[t].numel == 0 || !frozen.m[t].same_bits(model.m[t]), where + "moments do not follow");
  }
}

// As torch.optim.Adam: (1 - beta2) g^2 is finite where g^2 is not.
void check_large_gradients() {
  for (const double grad : {3e19, 1e-25, 1e-30}) {
    Model model({DType::kFloat32, DType::kFloat32, false, false, false}, {{100}});
    model.options.eps = 1e-30;
    for (int64_t i = 0; i < 100; ++i) model.params[0].set(i, 0.0), model.grads[0].set(i, kGradScale * grad);
    model.run(1, 1, true);
    const double step = model.params[0].at(99);
    expect(std::isfinite(model.v[0].at(99)) && step < -1e-4 && std::isfinite(step), "gradient " + std::to_string(grad));
    expect(model.paths[0].at(99) != 0.0 && std::isfinite(model.scales[0]), "path of gradient " + std::to_string(grad));
  }
}

// An element meets the same instructions wherever it lies in its tensor.
void check_position() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
    const Case c{dtype, dtype, false, false, true};
    Model whole(c, {{101}}), tail(c, {{60}});
    for (int64_t i = 0; i < 60; ++i) {
      tail.params[0].set(i, whole.params[0].at(41 + i));
      tail.grads[0].set(i, whole.grads[0].at(41 + i));
    }
    for (Model* model : {&whole, &tail}) {
      model->options.adapt_lr = 0.0;
      model->run(3, 1, true);
    }
    for (int64_t i = 0; i < 60; ++i) {
      expect(tail.params[0].at(i) == whole.params[0].at(41 + i) && tail.paths[0].at(i) == whole.paths[0].at(41 + i),
             c.name() + ": element " + std::to_string(i) + " depends on its place");
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Conversions of this translation unit's instruction set
// ---------------------------------------------------------------------------------------------------------------

float nearest_of(DType dtype, float value) {
  if (std::isnan(value)) return value;
  // The neighbours in the storage type, by exhaustion over its exponent: round |value| to a multiple of the unit.
  const int min_exponent = dtype == DType::kFloat16 ? -14 : -126, digits = dtype == DType::kFloat16 ? 10 : 7;
  int exponent = 0;
  std::frexp(value, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 1, min_exponent) - digits);
  const double rounded = std::nearbyint(static_cast<double>(value) / unit) * unit;
  const double largest = dtype == DType::kFloat16 ? 65504.0 : 3.3895313892515355e38;
  if (std::isinf(value) || std::fabs(rounded) > largest) return std::copysign(INFINITY, value);
  return static_cast<float>(rounded);
}

void check_conversions() {
  using namespace cpu;
  std::mt19937 random(3);
  std::vector<float> values = {0.0f,      -0.0f,     1.0f,       65504.0f,   65519.99f, 65520.0f, -65536.0f,
                               0x1p-24f,  0x1p-25f,  0x1.8p-25f, 0x1.004p0f, INFINITY,  NAN,      -INFINITY,
                               0x1p-126f, 0x1p-149f, 3.4e38f,    0x1.01p0f,  0x1.03p0f, 1e-5f,    6.1e-5f};
  for (int i = 0; i < 20000; ++i) {
    uint32_t bits = static_cast<uint32_t>(random());
    if (i % 2) bits = (bits & 0x8FFFFFFFu) | 0x30000000u;  // around the range of float16
    values.push_back(bits_as<float>(bits));
  }
  for (const float value : values) {
    const FloatVector vector = FloatVector{} + value;
    BFloat16 bfloats[kLanes<float>];
    Float16 halves[kLanes<float>];
    store(vector, bfloats);
    store(vector, halves);
    const float as_bfloat = load(bfloats)[0], as_half = load(halves)[0];
    const auto same = [](float a, float b) { return (std::isnan(a) && std::isnan(b)) || a == b; };
    expect(same(as_bfloat, nearest_of(DType::kBFloat16, value)), "bfloat16 of " + std::to_string(value));
    expect(same(as_half, nearest_of(DType::kFloat16, value)), "float16 of " + std::to_string(value));
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    Float16 halves[kLanes<float>];
    std::fill_n(halves, kLanes<float>, Float16{half});
    const double expected = read(reinterpret_cast<const char*>(&half), DType::kFloat16);
    const float got = load(halves)[0];
    expect((std::isnan(expected) && std::isnan(got)) || expected == got, "float16 bits " + std::to_string(bits));
  }
}

void check_order_free_sum() {
  std::vector<double> values;
  std::mt19937 random(5);
  for (int i = 0; i < 1000; ++i) {
    const double sign = random() % 2 ? 1.0 : -1.0;
    values.push_back(sign * std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 40) - 40));
  }
  double largest = 0.0;
  for (const double value : values) largest = std::max(largest, std::fabs(value));
  const double scale = fixed_point_scale(largest, 1000);
  int64_t sum = 0, shuffled_sum = 0;
  double plain = 0.0;
  for (const double value : values) sum += to_fixed_point(value, scale), plain += value;
  std::shuffle(values.begin(), values.end(), random);
  for (const double value : values) shuffled_sum += to_fixed_point(value, scale);
  expect(sum == shuffled_sum, "the fixed-point sum depends on the order");
  expect(std::fabs(from_fixed_point(sum, scale) - plain) <= 1e-12 * largest, "the fixed-point sum is off");
  // As many as the count of bits allows, all just below the next power of two; nothing but zeros; next to nothing.
  for (const double value : {std::nextafter(8.0, 0.0), std::nextafter(1e300, 0.0), 1.0, 0.0, 0x1p-930, 0x1p-990}) {
    for (const int64_t count : {1, 4, 1024, 1025}) {
      const double unit = fixed_point_scale(value, count);
      int64_t equal_sum = 0;
      for (int64_t i = 0; i < count; ++i) equal_sum += to_fixed_point(value, unit);
      const double expected = value * static_cast<double>(count);
      expect(std::fabs(from_fixed_point(equal_sum, unit) - expected) <= 1e-9 * expected,
             "the fixed-point sum of " + std::to_string(count) + " equal values is off");
    }
  }
}

}  // namespace

// With an argument: float32 parameters alone, for sanitizers that take their time.
int main(int argc, char**) {
  check_conversions();
  check_order_free_sum();
  check_metric();
  check_lr_zero();
  check_large_gradients();
  check_position();
  std::vector<DType> dtypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  if (argc > 1) dtypes.resize(1);
  int cases = 0;
  for (const DType param : dtypes) {
    for (const DType grad : dtypes) {
      if (!cpu::supports(param, grad)) continue;
      for (int flags = 0; flags < 8; ++flags) {
        check({param, grad, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0});
        ++cases;
      }
    }
  }
  std::printf("%d cases, %s kernels, threads of %s, %d failures\n", cases, cpu::best_kernels().instruction_set,
              cpu::thread_source(), failures);
  return failures == 0 ? 0 : 1;
}
