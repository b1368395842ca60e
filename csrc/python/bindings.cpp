// clara_fused._core: what Python sees of the core. Addresses come in as integers; the Python side owns and has checked
// the tensors behind them. The GIL is released around numeric work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "python/tensor_watch.h"
#include "reference_table.h"
#include "tensor_list.h"
#if defined(CLARA_WITH_CUDA)
#include "cuda/cuda_backend.h"
#endif

namespace py = pybind11;

namespace clara {
namespace python {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Options of the param groups of an optimizer, as one device sees them. Shared by the buckets on that device.
class GroupTable {
 public:
  explicit GroupTable(int64_t group_count)
      : options(static_cast<size_t>(group_count)), tables_(static_cast<size_t>(group_count)) {}

  // lr is set on its own, because it may change at every step.
  void set(int64_t group, double beta1, double beta2, double eps, double weight_decay, bool maximize,
           bool decoupled_weight_decay, double smoothing, double damping, std::optional<double> reference,
           bool measured_walk, double clip_low, double clip_high, bool accumulate, double scale_low, double scale_high,
           bool adapt_lr, std::optional<double> lr_smoothing) {
    GroupOptions& o = options.at(static_cast<size_t>(group));
    o.maximize = maximize;
    o.decoupled_weight_decay = decoupled_weight_decay;
    o.accumulate = accumulate;
    o.adapt_lr = adapt_lr;
    o.scale_rule = lr_smoothing ? ScaleRule::kSmoothed : ScaleRule::kFactor;
    o.beta1 = beta1;
    o.beta2 = beta2;
    o.log_beta1 = std::log(beta1);
    o.log_beta2 = std::log(beta2);
    o.eps = eps;
    o.weight_decay = weight_decay;
    o.path_decay = 1.0 - smoothing;
    o.path_gain = std::sqrt(smoothing * (2.0 - smoothing));
    o.factor_gain = smoothing / (2.0 * damping);
    o.walk_unit = measured_walk ? WalkUnit::kStepSquared : WalkUnit::kElement;
    o.clip_low = clip_low;
    o.clip_high = clip_high;
    o.lr_smoothing = lr_smoothing.value_or(0.0);
    o.scale_low = scale_low;
    o.scale_high = scale_high;
    std::shared_ptr<const std::vector<double>>& table = tables_[static_cast<size_t>(group)];
    if (reference) {
      table.reset();
      o.reference = {nullptr, 0, *reference, 0.0};
    } else {
      table = shared_table(beta1, smoothing, measured_walk);
      const double limit = measured_walk ? measured_walk_limit(beta1, smoothing) : random_walk_limit(beta1, smoothing);
      o.reference = {table->data(), static_cast<int64_t>(table->size()), limit, random_walk_log_tail_decay(smoothing)};
    }
  }

  void set_lr(int64_t group, double lr) {
    options.at(static_cast<size_t>(group)).lr = lr;
    options[static_cast<size_t>(group)].lr_tensor = nullptr;
  }

  void set_lr_tensor(int64_t group, Address lr, bool is_double) {
    options.at(static_cast<size_t>(group)).lr_tensor = pointer<const void>(lr);
    options[static_cast<size_t>(group)].lr_tensor_is_double = is_double;
  }

  // For a CUDA device: the values of the group's walk, in its memory.
  void set_reference_address(int64_t group, Address values) {
    options.at(static_cast<size_t>(group)).reference.values = pointer<const double>(values);
  }

  std::vector<GroupOptions> options;

 private:
  using TableKey = std::tuple<double, double, bool>;

  // Groups mostly agree on beta1 and smoothing.
  std::shared_ptr<const std::vector<double>> shared_table(double beta1, double smoothing, bool measured_walk) {
    const TableKey key{beta1, smoothing, measured_walk};
    std::shared_ptr<const std::vector<double>> table = known_tables_[key].lock();
    if (table) return table;
    forget_unused_tables();
    table = std::make_shared<const std::vector<double>>(measured_walk ? measured_walk_table(beta1, smoothing)
                                                                      : random_walk_table(beta1, smoothing));
    known_tables_[key] = table;
    return table;
  }

  // A schedule of betas asks for a new table at every step of a long run.
  void forget_unused_tables() {
    for (auto known = known_tables_.begin(); known != known_tables_.end();) {
      known = known->second.expired() ? known_tables_.erase(known) : std::next(known);
    }
  }

  std::vector<std::shared_ptr<const std::vector<double>>> tables_;
  std::map<TableKey, std::weak_ptr<const std::vector<double>>> known_tables_;
};

// The verbs by what they are given as the place to run.
struct Verbs {
  static void measure(const TensorList& list, const cpu::Schedule& where) {
    cpu::measure(list, where);
    cpu::reduce(list);
  }
  static void adapt(const TensorList& list, const PathSums* sums, const cpu::Schedule&) { cpu::adapt(list, sums); }
  static void apply(const TensorList& list, const cpu::Schedule& where) { cpu::apply(list, where); }
  static void step(const TensorList& list, const cpu::Schedule& where) { cpu::step(list, where); }
#if defined(CLARA_WITH_CUDA)
  static void measure(const TensorList& list, const cuda::Placement& where) { cuda::measure(list, where); }
  static void adapt(const TensorList& list, const PathSums* sums, const cuda::Placement& where) {
    cuda::adapt(list, sums, where);
  }
  static void apply(const TensorList& list, const cuda::Placement& where) { cuda::apply(list, where); }
  static void step(const TensorList& list, const cuda::Placement& where) { cuda::step(list, where); }
#endif
};

// Tensors that share device, storage types and `deferred`, with everything their steps need beside memory of torch's.
class Bucket {
 public:
  // device: index of a CUDA device, -1 for the CPU.
  Bucket(std::shared_ptr<GroupTable> groups, int device, Variant variant, DType param, DType grad, DType path,
         bool deferred)
      : groups_(std::move(groups)), device_(device), grads_(std::make_shared<GradSlots>()) {
    list_.param_dtype = param;
    list_.grad_dtype = grad;
    list_.path_dtype = path;
    list_.variant = variant;
    list_.deferred = deferred;
#if !defined(CLARA_WITH_CUDA)
    if (device >= 0) throw std::runtime_error("the compiled core was built without CUDA; rebuild it where nvcc is");
#endif
  }

  int64_t add(int64_t group, int64_t numel, Address param, Address grad, Address exp_avg, Address exp_avg_sq,
              Address max_exp_avg_sq, Address path, Address step, Address lr_scale) {
    if (group < 0 || group >= static_cast<int64_t>(groups_->options.size())) throw py::index_error("no such group");
    const int64_t row = static_cast<int64_t>(records_.size());
    records_.push_back({pointer<void>(param), pointer<void>(exp_avg), pointer<void>(exp_avg_sq),
                        pointer<void>(max_exp_avg_sq), pointer<void>(path), pointer<float>(step),
                        pointer<float>(lr_scale), numel, list_.chunk_count, static_cast<int32_t>(group), 0});
    list_.chunk_count += chunks_of(numel);
    grads_->add(pointer<const void>(grad));
    schedule_.reset();
    return row;
  }

  // Scalars of a GradScaler, float32, or 0. They hold for the following operations.
  void set_amp(Address grad_scale, Address found_inf) {
    list_.grad_scale = pointer<const float>(grad_scale);
    list_.found_inf = pointer<const float>(found_inf);
  }

  // CUDA: what Python has to allocate for the bucket on the device, and its first part to fill from the host, anew
  // whenever a tensor has been added.
  py::tuple memory_sizes() const {
#if defined(CLARA_WITH_CUDA)
    const cuda::Layout layout = cuda::layout(size(), list_.chunk_count);
    return py::make_tuple(layout.bytes, layout.table_bytes);
#else
    return py::make_tuple(0, 0);
#endif
  }

  void write_table(Address host_memory) const {
#if defined(CLARA_WITH_CUDA)
    cuda::write_table(records_.data(), size(), pointer<void>(host_memory));
#else
    (void)host_memory;
#endif
  }

  void set_memory(Address device_memory) { memory_ = device_memory; }

  // Measures and reduces into `sums`: float64 [n, 2] on the device.
  void measure(Address sums, int threads, Address stream) {
    list_.sums = pointer<PathSums>(sums);
    const GradsAreRead done{*grads_};
    run(threads, stream, [](const TensorList& list, const auto& where) { Verbs::measure(list, where); });
  }

  // Counts the step; `sums` as from measure, or 0: scales are set elsewhere.
  void adapt(Address sums, int threads, Address stream) {
    const auto* path_sums = pointer<const PathSums>(sums);
    run(threads, stream, [&](const TensorList& list, const auto& where) { Verbs::adapt(list, path_sums, where); });
  }

  void apply(int threads, Address stream) {
    run(threads, stream, [](const TensorList& list, const auto& where) { Verbs::apply(list, where); });
  }

  void step(int threads, Address stream) {
    own_sums_.resize(is_on_cuda() ? 0 : records_.size());
    list_.sums = own_sums_.data();
    const GradsAreRead done{*grads_};
    run(threads, stream, [](const TensorList& list, const auto& where) { Verbs::step(list, where); });
  }

  int64_t size() const { return static_cast<int64_t>(records_.size()); }
  const std::shared_ptr<GradSlots>& grads() const { return grads_; }

 private:
  // At the end of the only operations that read gradients, however they end. Kernels may still be reading then; memory
  // that is freed on a CUDA device is reused in the order of its stream.
  struct GradsAreRead {
    GradSlots& slots;
    ~GradsAreRead() { slots.release(); }
  };

  bool is_on_cuda() const { return device_ >= 0; }

  int64_t chunks_of(int64_t numel) const {
#if defined(CLARA_WITH_CUDA)
    if (is_on_cuda()) return cuda::chunks_of(numel);
#endif
    return cpu::chunks_of(numel);
  }

  // Calls operation(list, where): on the CPU `where` is a schedule, on a CUDA device a placement.
  template <typename Operation>
  void run(int threads, Address stream, Operation operation) {
    list_.tensors = records_.data();
    list_.count = size();
    list_.grads = grads_->addresses.data();
    list_.groups = groups_->options.data();
    list_.group_count = static_cast<int64_t>(groups_->options.size());
#if defined(CLARA_WITH_CUDA)
    if (is_on_cuda()) {
      const cuda::Placement where{device_, pointer<void>(stream), pointer<void>(memory_)};
      const py::gil_scoped_release released;
      operation(list_, where);
      return;
    }
#else
    (void)stream;
#endif
    if (!schedule_ || threads != schedule_threads_) {
      schedule_ = std::make_unique<cpu::Schedule>(records_.data(), size(), threads);
      schedule_threads_ = threads;
      partial_sums_.resize(static_cast<size_t>(list_.chunk_count));
    }
    list_.partial_sums = partial_sums_.data();
    const py::gil_scoped_release released;
    operation(list_, *schedule_);
  }

  std::shared_ptr<GroupTable> groups_;
  int device_;
  Address memory_ = 0;
  std::shared_ptr<GradSlots> grads_;
  std::vector<TensorRecord> records_;
  TensorList list_{};
  std::unique_ptr<cpu::Schedule> schedule_;
  int schedule_threads_ = 0;
  std::vector<PartialSums<double>> partial_sums_;
  std::vector<PathSums> own_sums_;
};

py::dict build_info() {
  py::dict info;
#if defined(CLARA_CPU_X86_KERNELS)
  info["cpu_instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  info["cpu_instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
  info["cpu_instruction_set"] = cpu::best_kernels().instruction_set;
  info["cpu_threads"] = cpu::thread_source();
  info["compiler"] = __VERSION__;
#if defined(CLARA_WITH_CUDA)
  info["cuda"] = py::dict(py::arg("toolkit") = CLARA_CUDA_TOOLKIT, py::arg("architectures") = CLARA_CUDA_ARCHITECTURES);
#else
  info["cuda"] = py::none();
#endif
  return info;
}

bool supports(bool on_cuda, DType param, DType grad, DType path) {
  if (!on_cuda) return cpu::supports(param, grad, path);
#if defined(CLARA_WITH_CUDA)
  return cuda::supports(param, grad, path);
#else
  return false;
#endif
}

// Why this CUDA device cannot be used; empty if it can.
std::string cuda_problem(int device) {
#if defined(CLARA_WITH_CUDA)
  return cuda::device_problem(device);
#else
  (void)device;
  return "the compiled core was built without CUDA; reinstall it where the CUDA toolkit (12.4 or newer) is installed";
#endif
}

}  // namespace
}  // namespace python
}  // namespace clara

PYBIND11_MODULE(_core, m) {
  using namespace clara;
  using namespace clara::python;
  m.doc() = "Compiled core of clara_fused: measure, adapt and apply on raw memory.";

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64);
  py::enum_<Variant>(m, "Variant")
      .value("GLOBAL", Variant::kGlobal)
      .value("LOCAL", Variant::kLocal)
      .value("SMOOTHED", Variant::kSmoothed);

  py::class_<GroupTable, std::shared_ptr<GroupTable>>(m, "GroupTable")
      .def(py::init<int64_t>(), py::arg("group_count"))
      .def("set", &GroupTable::set, py::arg("group"), py::kw_only(), py::arg("beta1"), py::arg("beta2"),
           py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"), py::arg("decoupled_weight_decay"),
           py::arg("smoothing"), py::arg("damping"), py::arg("reference"), py::arg("measured_walk"),
           py::arg("clip_low"), py::arg("clip_high"), py::arg("accumulate"), py::arg("scale_low"),
           py::arg("scale_high"), py::arg("adapt_lr"), py::arg("lr_smoothing"))
      .def("set_lr", &GroupTable::set_lr, py::arg("group"), py::arg("lr"))
      .def("set_lr_tensor", &GroupTable::set_lr_tensor, py::arg("group"), py::arg("address"), py::arg("is_double"))
      .def("set_reference_address", &GroupTable::set_reference_address, py::arg("group"), py::arg("values"));

  py::class_<Bucket>(m, "Bucket")
      .def(py::init<std::shared_ptr<GroupTable>, int, Variant, DType, DType, DType, bool>(), py::arg("groups"),
           py::kw_only(), py::arg("device"), py::arg("variant"), py::arg("param"), py::arg("grad"), py::arg("path"),
           py::arg("deferred"))
      .def("add", &Bucket::add, py::kw_only(), py::arg("group"), py::arg("numel"), py::arg("param"), py::arg("grad"),
           py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("max_exp_avg_sq"), py::arg("path"), py::arg("step"),
           py::arg("lr_scale"))
      .def("set_amp", &Bucket::set_amp, py::arg("grad_scale"), py::arg("found_inf"))
      .def("memory_sizes", &Bucket::memory_sizes)
      .def("write_table", &Bucket::write_table, py::arg("host_memory"))
      .def("set_memory", &Bucket::set_memory, py::arg("device_memory"))
      .def("measure", &Bucket::measure, py::arg("sums"), py::arg("threads"), py::arg("stream"))
      .def("adapt", &Bucket::adapt, py::arg("sums"), py::arg("threads"), py::arg("stream"))
      .def("apply", &Bucket::apply, py::arg("threads"), py::arg("stream"))
      .def("step", &Bucket::step, py::arg("threads"), py::arg("stream"))
      .def("__len__", &Bucket::size);

  py::class_<TensorWatch>(m, "TensorWatch")
      .def(py::init<py::list, py::dict, bool>(), py::arg("param_groups"), py::arg("state"),
           py::arg("use_exchange_api") = true)
      .def(
          "route",
          [](TensorWatch& watch, int64_t group, int64_t param, const Bucket& bucket, int64_t row) {
            watch.route(group, param, bucket.grads(), row);
          },
          py::arg("group"), py::arg("param"), py::arg("bucket"), py::arg("row"))
      .def("unchanged", &TensorWatch::unchanged, py::arg("param_groups"), py::arg("state"))
      .def("params_with_grad", &TensorWatch::params_with_grad, py::arg("param_groups"))
      .def_property_readonly("uses_exchange_api", &TensorWatch::uses_exchange_api);

  m.attr("version") = CLARA_VERSION;
  m.attr("interface") = CLARA_INTERFACE;
  m.def("supports", &supports, py::arg("cuda"), py::arg("param"), py::arg("grad"), py::arg("path"));
  m.def("build_info", &build_info);
  m.def("release_workspace", [] { return cpu::Workspace::of_process()->release(); },
        "Free the memory that steps on the CPU share until the next one needs it; returns its size in bytes.");
  m.def("cuda_problem", &cuda_problem, py::arg("device"));
  m.def("random_walk_table", &random_walk_table, py::arg("beta1"), py::arg("smoothing"));
  m.def("measured_walk_table", &measured_walk_table, py::arg("beta1"), py::arg("smoothing"));
}
