// The CPU core without Python or torch, for the sanitizers: exact heap blocks, so that a read or write outside of a
// tensor is caught; odd thread counts; every combination of storage types, mode and size around vector, line and
// chunk borders. Exits with 1 and says what differs.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/cpu_backend.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/storage.h"
#include "../../csrc/cpu/team.h"
#include "../../csrc/reference_table.h"

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
        half = static_cast<uint16_t>(((bits >> 16) & 0x8000) | ((((bits >> 23) & 255) - 112) << 10) | ((bits >> 13) & 1023));
      }
      break;
  }
  std::memcpy(at, &half, 2);
}

// ---------------------------------------------------------------------------------------------------------------
// Tensors: blocks that end where the tensor ends, and start off the alignment of a vector
// ---------------------------------------------------------------------------------------------------------------

struct Case {
  DType param, grad, path;
  Variant variant;
  bool deferred, amsgrad, coupled;

  std::string name() const {
    return std::string(name_of(param)) + "/" + name_of(grad) + "/" + name_of(path) + " variant " +
           std::to_string(static_cast<int>(variant)) + (deferred ? " deferred" : "") + (amsgrad ? " amsgrad" : "") +
           (coupled ? " coupled" : "");
  }
  DType moments() const { return param == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

  std::vector<int64_t> sizes() const {
    std::vector<int64_t> sizes = {0, 1, 3, 15, 16, 17, 0, 63, 65, 128, cpu::kChunk - 1, cpu::kChunk, cpu::kChunk + 1,
                                  5 * cpu::kChunk + 7, 2, 4 * cpu::kChunk + 1};
    // So large that three threads keep the directions of both; in a few cases, for the sanitizers take their time.
    if (variant == Variant::kLocal && !deferred && grad == param && path == moments()) {
      sizes.insert(sizes.end(), {13 * cpu::kChunk + 9, 12 * cpu::kChunk + 1});
    }
    return sizes;
  }
};

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

struct Model {
  Case c;
  std::vector<int64_t> sizes;
  std::vector<Tensor> params, grads, m, v, v_max, paths;
  std::vector<float> steps, scales;
  std::vector<double> table;
  GroupOptions options{};

  explicit Model(const Case& of) : Model(of, of.sizes()) {}

  Model(const Case& of, std::vector<int64_t> with_sizes)
      : c(of), sizes(std::move(with_sizes)), table(random_walk_table(0.9, 0.2)) {
    std::mt19937 random(7);
    for (const int64_t numel : sizes) {
      params.emplace_back(numel, c.param);
      grads.emplace_back(numel, c.grad);
      m.emplace_back(numel, c.moments());
      v.emplace_back(numel, c.moments());
      v_max.emplace_back(numel, c.moments());
      paths.emplace_back(numel, c.path);
      for (int64_t i = 0; i < numel; ++i) {
        params.back().set(i, std::ldexp(static_cast<int>(random() % 256) - 128, -6));
        // Odd multiples: never 0, which would make 0/0 of a step with eps = 0, as it does in torch.
        grads.back().set(i, std::ldexp(2 * static_cast<int>(random() % 32) - 19, -5));
      }
    }
    steps.assign(sizes.size(), 0.0f);
    scales.assign(c.variant == Variant::kGlobal ? 1 : sizes.size(), 1.0f);
    options.lr = 0.01;
    options.accumulate = options.adapt_lr = 1;
    options.scale_rule = c.variant == Variant::kSmoothed ? ScaleRule::kSmoothed : ScaleRule::kFactor;
    options.decoupled_weight_decay = !c.coupled;
    options.weight_decay = c.coupled ? 0.03 : 0.0;
    options.beta1 = 0.9, options.beta2 = 0.99;
    options.log_beta1 = std::log(0.9), options.log_beta2 = std::log(0.99);
    options.eps = 0.0;
    options.path_decay = 0.8, options.path_gain = 0.6;
    options.factor_gain = 0.1;
    options.clip_low = 0.5, options.clip_high = 1.5;
    options.lr_smoothing = 0.5;
    options.scale_low = 1e-4, options.scale_high = 1e4;
  }

  void run(int steps_to_take, int threads, bool in_one_go, float found_inf = 0.0f,
           int64_t max_kept_bytes = int64_t{1} << 30) {
    options.reference = {table.data(), static_cast<int64_t>(table.size()), random_walk_limit(0.9, 0.2),
                         random_walk_log_tail_decay(0.2)};
    std::vector<TensorRecord> records;
    std::vector<const void*> grad_pointers;
    int64_t chunks = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      records.push_back({params[i].data(), m[i].data(), v[i].data(), c.amsgrad ? v_max[i].data() : nullptr,
                         paths[i].data(), &steps[i], &scales[scales.size() == 1 ? 0 : i], sizes[i], chunks, 0, 0});
      chunks += cpu::chunks_of(sizes[i]);
      grad_pointers.push_back(grads[i].data());
    }
    std::vector<PartialSums<double>> partial_sums(static_cast<size_t>(chunks));
    std::vector<PathSums> sums(sizes.size());
    const float grad_scale = 2.0f;
    TensorList list{};
    list.tensors = records.data();
    list.count = static_cast<int64_t>(records.size());
    list.grads = grad_pointers.data();
    list.groups = &options;
    list.group_count = 1;
    list.chunk_count = chunks;
    list.partial_sums = partial_sums.data();
    list.sums = sums.data();
    list.grad_scale = &grad_scale;
    list.found_inf = &found_inf;
    list.param_dtype = c.param, list.grad_dtype = c.grad, list.path_dtype = c.path;
    list.variant = c.variant;
    list.deferred = c.deferred;
    const cpu::Schedule schedule(records.data(), list.count, threads, max_kept_bytes);
    for (int t = 0; t < steps_to_take; ++t) {
      if (in_one_go) {
        cpu::step(list, schedule);
        continue;
      }
      cpu::measure(list, schedule);
      cpu::reduce(list);
      cpu::adapt(list, sums.data());
      cpu::apply(list, schedule);
    }
  }

  bool same_bits(const Model& other) const {
    const auto same = [](const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
      return std::equal(a.begin(), a.end(), b.begin(), [](const Tensor& x, const Tensor& y) { return x.same_bits(y); });
    };
    return same(params, other.params) && same(m, other.m) && same(v, other.v) && same(v_max, other.v_max) &&
           same(paths, other.paths) && steps == other.steps && scales == other.scales;
  }
};

// One step from zero state, element by element in double.
void check_first_step(const Case& c) {
  Model before(c), after(c);
  after.options.eps = before.options.eps = 1e-3;
  after.run(1, 2, true);
  const double unit = c.param == DType::kBFloat16 ? 0x1p-8 : c.param == DType::kFloat16 ? 0x1p-11 : 0x1p-20;
  const double path_unit = c.path == DType::kBFloat16 ? 0x1p-8 : 0x1p-20;
  for (size_t t = 0; t < after.sizes.size(); ++t) {
    double path_sq = 0.0;
    for (int64_t i = 0; i < after.sizes[t]; ++i) {
      const double param = before.params[t].at(i);
      const double grad = before.grads[t].at(i) / 2.0 + before.options.weight_decay * param;
      const double direction = grad / (std::fabs(grad) + 1e-3), path = 0.6 * direction;
      path_sq += after.paths[t].at(i) * after.paths[t].at(i);
      const double mu = c.deferred ? 1.0 : after.scales[after.scales.size() == 1 ? 0 : t];
      const double expected = param - 0.01 * mu * direction;
      if (!(std::fabs(after.paths[t].at(i) - path) <= path_unit * std::fabs(path) + 1e-6)) {
        expect(false, c.name() + ": path " + std::to_string(after.paths[t].at(i)) + " instead of " + std::to_string(path));
        return;
      }
      if (!(std::fabs(after.params[t].at(i) - expected) <= unit * std::fabs(expected) + 1e-6)) {
        expect(false, c.name() + ": parameter " + std::to_string(after.params[t].at(i)) + " instead of " +
                          std::to_string(expected));
        return;
      }
    }
    expect(after.steps[t] == 1.0f, c.name() + ": step not counted");
    if (c.variant == Variant::kLocal && after.sizes[t] > 0) {
      const double ratio = path_sq / (static_cast<double>(after.sizes[t]) * after.table[0]);
      const double mu = std::min(std::max(std::exp(0.1 * (ratio - 1.0)), 0.5), 1.5);
      expect(std::fabs(after.scales[t] - mu) < 1e-5, c.name() + ": scale");
    }
  }
}

void check(const Case& c) {
  check_first_step(c);
  Model once(c), verbs(c), skipped(c);
  once.run(3, 1, true);
  // However many threads, and whatever is kept between measure and apply: the steps of no chunk, of some, of all.
  for (const int64_t max_kept_bytes : {int64_t{0}, int64_t{2 * cpu::kChunk * sizeof(double)}, int64_t{1} << 30}) {
    for (const int threads : {1, 3}) {
      Model kept(c);
      kept.run(3, threads, true, 0.0f, max_kept_bytes);
      expect(kept.same_bits(once), c.name() + ": differs with " + std::to_string(threads) + " threads and at most " +
                                       std::to_string(max_kept_bytes) + " bytes of kept directions");
    }
  }
  if (c.variant != Variant::kGlobal) {
    verbs.run(3, 3, false);
    expect(verbs.same_bits(once), c.name() + ": the verbs differ from the whole step");
  }
  skipped.run(2, 3, true, 1.0f);
  expect(skipped.same_bits(Model(c)), c.name() + ": changed in spite of found_inf");
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
    Stored<FloatVector>::store(vector, bfloats);
    Stored<FloatVector>::store(vector, halves);
    const float as_bfloat = Stored<FloatVector>::load(bfloats)[0], as_half = Stored<FloatVector>::load(halves)[0];
    const auto same = [](float a, float b) { return (std::isnan(a) && std::isnan(b)) || a == b; };
    expect(same(as_bfloat, nearest_of(DType::kBFloat16, value)), "bfloat16 of " + std::to_string(value));
    expect(same(as_half, nearest_of(DType::kFloat16, value)), "float16 of " + std::to_string(value));
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    Float16 halves[kLanes<float>];
    std::fill_n(halves, kLanes<float>, Float16{half});
    const double expected = read(reinterpret_cast<const char*>(&half), DType::kFloat16);
    const float got = Stored<FloatVector>::load(halves)[0];
    expect((std::isnan(expected) && std::isnan(got)) || expected == got, "float16 bits " + std::to_string(bits));
  }
  // One rounding, not two: halfway between two bfloat16 after a rounding to float32, but not before.
  const DoubleVector tricky = DoubleVector{} + (1.0 + 0x1p-8 + 0x1p-40);
  BFloat16 bfloats[kLanes<double>];
  Stored<DoubleVector>::store(tricky, bfloats);
  expect(Stored<DoubleVector>::load(bfloats)[0] == 1.0 + 0x1p-7, "float64 to bfloat16 rounds twice");
}

// A step must not wait for another thread's, nor find its memory taken from under it.
void check_workspace() {
  const auto workspace = cpu::Workspace::of_process();
  expect(cpu::Workspace::of_process() == workspace, "two workspaces in one process");
  expect(cpu::Workspace::Loan(*workspace, 0).memory() == nullptr, "memory that nobody asked for");
  {
    const cpu::Workspace::Loan loan(*workspace, 1000);
    expect(loan.memory() != nullptr && reinterpret_cast<uintptr_t>(loan.memory()) % 64 == 0, "memory not as promised");
    std::memset(loan.memory(), 1, 1000);
    std::thread([&] {
      const cpu::Workspace::Loan other(*workspace, 10);
      expect(other.memory() == nullptr, "two threads have the workspace");
      expect(workspace->release() == 0, "memory freed that a thread uses");
    }).join();
  }
  {
    const cpu::Workspace::Loan larger(*workspace, 100000);
    expect(larger.memory() != nullptr, "not given back");
    std::memset(larger.memory(), 1, 100000);
  }
  const cpu::Workspace::Loan smaller(*workspace, 1000);
  expect(smaller.memory() != nullptr, "not given back");
}

void check_workspace_of_threads() {
  const Case c{DType::kFloat32, DType::kFloat32, DType::kFloat32, Variant::kLocal, false, false, false};
  Model alone(c), first(c), second(c);
  alone.run(20, 2, true);
  std::thread beside([&] { first.run(20, 2, true); });
  second.run(20, 2, true);
  beside.join();
  expect(first.same_bits(alone) && second.same_bits(alone), "steps of two threads at once disturb each other");
}

// Tensors of one thread keep their directions where those of a shared one were; the last one has no successor.
void check_kept_directions_of_many() {
  const Case c{DType::kFloat32, DType::kFloat32, DType::kFloat32, Variant::kLocal, false, false, false};
  std::vector<int64_t> sizes = {330'000};
  sizes.insert(sizes.end(), 12, 66'000);
  Model not_kept(c, sizes);
  not_kept.run(2, 1, true, 0.0f, 0);
  for (const int threads : {1, 2}) {
    Model kept(c, sizes);
    kept.run(2, threads, true);
    expect(kept.same_bits(not_kept), "kept directions change a list of many: " + std::to_string(threads) + " threads");
  }
}

void check_order_free_sum() {
  const Case c{DType::kFloat32, DType::kFloat32, DType::kFloat32, Variant::kGlobal, false, false, false};
  Model model(c);
  model.run(3, 2, true);
  expect(std::isfinite(model.scales[0]) && model.scales[0] != 1.0f, "the global scale does not move");
  std::vector<double> values;
  std::mt19937 random(5);
  for (int i = 0; i < 1000; ++i) values.push_back(std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 40) - 40));
  const double scale = fixed_point_scale(*std::max_element(values.begin(), values.end()), 1000);
  int64_t sum = 0, shuffled_sum = 0;
  double plain = 0.0;
  for (const double value : values) sum += to_fixed_point(value, scale), plain += value;
  std::shuffle(values.begin(), values.end(), random);
  for (const double value : values) shuffled_sum += to_fixed_point(value, scale);
  expect(sum == shuffled_sum, "the fixed-point sum depends on the order");
  expect(std::fabs(from_fixed_point(sum, scale) - plain) <= 1e-12 * plain, "the fixed-point sum is off");
  // As many as the count of bits allows, all just below the next power of two; nothing but zeros; norms next to nothing.
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
  check_workspace();
  check_workspace_of_threads();
  check_kept_directions_of_many();
  std::vector<DType> dtypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  if (argc > 1) dtypes.resize(1);
  int cases = 0;
  for (const DType param : dtypes) {
    for (const DType grad : dtypes) {
      for (const DType path : dtypes) {
        if (!cpu::supports(param, grad, path)) continue;
        for (const Variant variant : {Variant::kGlobal, Variant::kLocal, Variant::kSmoothed}) {
          for (int flags = 0; flags < 8; ++flags) {
            check({param, grad, path, variant, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0});
            ++cases;
          }
        }
      }
    }
  }
  std::printf("%d cases, %s kernels, threads of %s, %d failures\n", cases, cpu::best_kernels().instruction_set,
              cpu::thread_source(), failures);
  return failures == 0 ? 0 : 1;
}
