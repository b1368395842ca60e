// clara_fused.core._core: what Python sees of the core. Addresses come in as integers; the Python side owns the memory
// behind them. The GIL is released around numeric work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/cpu_backend.h"
#include "../cpu/kernels.h"
#include "../cpu/team.h"
#include "../cuda/cuda_backend.h"
#include "gather.h"

namespace py = pybind11;

namespace clara::python {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

constexpr size_t kOptions = offsetof(GroupOptions, lr_tensor) / sizeof(double);  // they are the first members

// Options of the param groups of an optimizer, as one device sees them.
class GroupTable {
 public:
  explicit GroupTable(size_t group_count) : options_(group_count) {}

  void set(size_t group, const std::vector<double>& values, Address lr_tensor, bool lr_tensor_is_double) {
    if (values.size() != kOptions) throw py::value_error("expected one value for each of OPTION_NAMES");
    GroupOptions& options = options_.at(group);
    std::memcpy(static_cast<void*>(&options), values.data(), kOptions * sizeof(double));
    options.lr_tensor = pointer<const void>(lr_tensor);
    options.lr_tensor_is_double = lr_tensor_is_double;
  }

  const std::vector<GroupOptions>& options() const { return options_; }

 private:
  std::vector<GroupOptions> options_;
};

// The tensors of one device and storage types in one step.
class Bucket {
 public:
  Bucket(GatheredBucket gathered, bool one_scale) : tensors_(std::move(gathered)) {
    list_.tensors = tensors_.records.data();
    list_.count = size();
    list_.grads = tensors_.grads.data();
    list_.param_dtype = tensors_.param_dtype;
    list_.grad_dtype = tensors_.grad_dtype;
    list_.one_scale = one_scale;
    const auto number_chunks = is_on_cuda() ? cuda::number_chunks : cpu::number_chunks;
    number_chunks(list_, tensors_.records.data());
  }

  int64_t size() const { return static_cast<int64_t>(tensors_.records.size()); }
  const std::vector<Location>& locations() const { return tensors_.locations; }

  std::pair<const char*, int32_t> device() const { return {is_on_cuda() ? "cuda" : "cpu", tensors_.device.index}; }

  py::list params() const {
    py::list objects(tensors_.params.size());
    for (size_t i = 0; i < tensors_.params.size(); ++i) objects[i] = py::handle(tensors_.params[i]);
    return objects;
  }

  // And the scalars of a GradScaler, float32 on the device, or 0.
  void set_inputs(std::shared_ptr<const GroupTable> groups, Address grad_scale, Address found_inf) {
    groups_ = std::move(groups);
    list_.groups = groups_->options().data();
    list_.group_count = static_cast<int64_t>(groups_->options().size());
    list_.grad_scale = pointer<const float>(grad_scale);
    list_.found_inf = pointer<const float>(found_inf);
  }

  // CUDA: what Python has to allocate for the bucket on the device, and its first part, to fill from the host.
  std::pair<int64_t, int64_t> memory_sizes() const {
    const cuda::Layout layout = cuda::layout(list_);
    return {layout.bytes, layout.table_bytes};
  }

  void write_table(Address host_memory) const { cuda::write_table(list_, pointer<void>(host_memory)); }

  bool table_equals(Address host_memory) const { return cuda::is_table_of(list_, pointer<void>(host_memory)); }

  void set_memory(Address device_memory) { memory_ = device_memory; }

  // Calls verb(list, where) with the placement of the bucket's back end. Its namespace is the one in which the verbs
  // are found: measure(list, sums, where) is cpu::measure or cuda::measure.
  template <typename Verb>
  void run(int threads, Address stream, Verb verb) const {
    if (is_on_cuda()) {
      const cuda::Placement where{tensors_.device.index, pointer<void>(stream), pointer<void>(memory_)};
      const py::gil_scoped_release released;
      verb(list_, where);
    } else {
      const py::gil_scoped_release released;
      verb(list_, cpu::Placement{threads});
    }
  }

 private:
  bool is_on_cuda() const { return tensors_.device.is_cuda; }

  GatheredBucket tensors_;
  std::shared_ptr<const GroupTable> groups_;
  TensorList list_{};
  Address memory_ = 0;
};

void measure_bucket(const Bucket& bucket, Address sums, int threads, Address stream) {
  bucket.run(threads, stream, [&](const TensorList& list, const auto& where) {
    measure(list, pointer<PathSums>(sums), where);
  });
}

void adapt_bucket(const Bucket& bucket, Address sums, Address evidence, int threads, Address stream) {
  bucket.run(threads, stream, [&](const TensorList& list, const auto& where) {
    adapt(list, pointer<const PathSums>(sums), pointer<Evidence>(evidence), where);
  });
}

void update_bucket(const Bucket& bucket, int threads, Address stream) {
  bucket.run(threads, stream, [](const TensorList& list, const auto& where) { update(list, where); });
}

void step_bucket(const Bucket& bucket, int threads, Address stream) {
  bucket.run(threads, stream, [](const TensorList& list, const auto& where) { step(list, where); });
}

std::pair<std::vector<std::shared_ptr<Bucket>>, std::vector<Location>> gather_buckets(
    const py::list& param_groups, const py::dict& state, const std::optional<py::list>& scales) {
  Gathering gathering = gather(param_groups, state, scales);
  std::vector<std::shared_ptr<Bucket>> buckets;
  for (GatheredBucket& bucket : gathering.buckets) {
    buckets.push_back(std::make_shared<Bucket>(std::move(bucket), scales.has_value()));
  }
  return {std::move(buckets), std::move(gathering.irregular)};
}

py::dict build_info() {
  py::dict info;
#if defined(CLARA_CPU_X86_KERNELS)
  info["cpu_instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  info["cpu_instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
  info["cpu_instruction_set"] = cpu::best_kernels().instruction_set;
  info["cpu_threads"] = cpu::thread_source();
  info["why_not_more"] = CLARA_WHY_NOT_MORE;  // what setup.py did not build, and what to do
  info["cuda"] = *CLARA_CUDA_TOOLKIT != 0 ? CLARA_CUDA_TOOLKIT ", architectures " CLARA_CUDA_ARCHITECTURES : "";
  return info;
}

}  // namespace
}  // namespace clara::python

PYBIND11_MODULE(_core, m) {
  using namespace clara;
  using namespace clara::python;
  m.doc() = "Compiled core of clara_fused: gather, measure, adapt and update on raw memory.";

  py::class_<GroupTable, std::shared_ptr<GroupTable>>(m, "GroupTable")
      .def(py::init<size_t>(), py::arg("group_count"))
      .def("set", &GroupTable::set, py::arg("group"), py::arg("values"), py::arg("lr_tensor"),
           py::arg("lr_tensor_is_double"));

  py::class_<Bucket, std::shared_ptr<Bucket>>(m, "Bucket")
      .def_property_readonly("device", &Bucket::device)
      .def_property_readonly("locations", &Bucket::locations)
      .def_property_readonly("params", &Bucket::params)
      .def("__len__", &Bucket::size)
      .def("set_inputs", &Bucket::set_inputs, py::arg("groups"), py::arg("grad_scale"), py::arg("found_inf"))
      .def("memory_sizes", &Bucket::memory_sizes)
      .def("write_table", &Bucket::write_table, py::arg("host_memory"))
      .def("table_equals", &Bucket::table_equals, py::arg("host_memory"))
      .def("set_memory", &Bucket::set_memory, py::arg("device_memory"))
      .def("measure", &measure_bucket, py::arg("sums"), py::arg("threads"), py::arg("stream"))
      .def("adapt", &adapt_bucket, py::arg("sums"), py::arg("evidence"), py::arg("threads"), py::arg("stream"))
      .def("update", &update_bucket, py::arg("threads"), py::arg("stream"))
      .def("step", &step_bucket, py::arg("threads"), py::arg("stream"));

  m.attr("version") = CLARA_VERSION;
  m.attr("interface") = CLARA_INTERFACE;
#define CLARA_NAME(name) #name,
  m.attr("OPTION_NAMES") = py::tuple(py::cast(std::vector<std::string>{CLARA_GROUP_OPTIONS(CLARA_NAME)}));
#undef CLARA_NAME
  m.def("gather", &gather_buckets, py::arg("param_groups"), py::arg("state"), py::arg("scales"));
  const auto supports_numbered = [](bool on_cuda, int param, int grad) {
    return supports(on_cuda, static_cast<DType>(param), static_cast<DType>(grad));
  };
  m.def("supports", supports_numbered, py::arg("on_cuda"), py::arg("param"), py::arg("grad"));
  m.def("build_info", &build_info);
  m.def("cuda_problem", &cuda::device_problem, py::arg("device"));
}
