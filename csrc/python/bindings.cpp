// clara_fused.core._core: what Python sees of the core. Addresses come in as integers; the Python side owns the memory
// behind them. The GIL is released around numeric work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstddef>
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

// The options of one param group: a clara_fused.options.GroupOptions, and its learning rate. Where a device has that: an
// address, and whether it is of a float64 (else a float32).
GroupOptions group_options(py::handle fields, py::handle lr) {
  GroupOptions options{};
#define CLARA_READ(name)                                                      \
  static PyObject* const name##_text = PyUnicode_InternFromString(#name);     \
  options.name = fields.attr(py::handle(name##_text)).cast<double>();
  CLARA_GROUP_OPTIONS(CLARA_READ)
#undef CLARA_READ
  options.log_beta1 = std::log(options.beta1);
  options.log_beta2 = std::log(options.beta2);
  if (PyFloat_Check(lr.ptr())) {
    options.lr = py::cast<double>(lr);
  } else {
    const auto [address, is_double] = py::cast<std::pair<Address, bool>>(lr);
    options.lr_tensor = pointer<const void>(address);
    options.lr_tensor_is_double = is_double;
  }
  return options;
}

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

  std::string device() const { return is_on_cuda() ? "cuda:" + std::to_string(tensors_.device.index) : "cpu"; }

  py::list params() const {
    py::list objects(tensors_.params.size());
    for (size_t i = 0; i < tensors_.params.size(); ++i) objects[i] = py::handle(tensors_.params[i]);
    return objects;
  }

  // Options and learning rates of all param groups; the scalars of a GradScaler, float32 on the device, or 0.
  void set_inputs(const py::sequence& options, const py::sequence& lrs, Address grad_scale, Address found_inf) {
    const size_t count = options.size();
    if (lrs.size() != count) throw py::value_error("expected as many learning rates as options");
    groups_.assign(count, {});
    std::vector<bool> read(count);
    for (const TensorRecord& tensor : tensors_.records) {  // of groups without a tensor here nothing is read
      const auto i = static_cast<size_t>(tensor.group);
      if (i >= count) throw py::value_error("expected options of every param group");
      if (!read[i]) groups_[i] = group_options(options[i], lrs[i]), read[i] = true;
    }
    list_.groups = groups_.data();
    list_.group_count = static_cast<int64_t>(groups_.size());
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
  std::vector<GroupOptions> groups_;
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

  py::class_<Bucket, std::shared_ptr<Bucket>>(m, "Bucket")
      .def_property_readonly("device", &Bucket::device)
      .def_property_readonly("locations", &Bucket::locations)
      .def_property_readonly("params", &Bucket::params)
      .def("__len__", &Bucket::size)
      .def("set_inputs", &Bucket::set_inputs, py::arg("options"), py::arg("lrs"), py::arg("grad_scale"),
           py::arg("found_inf"))
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
  m.def("gather", &gather_buckets, py::arg("param_groups"), py::arg("state"), py::arg("scales"));
  const auto supports_numbered = [](bool on_cuda, int param, int grad) {
    return supports(on_cuda, static_cast<DType>(param), static_cast<DType>(grad));
  };
  m.def("supports", supports_numbered, py::arg("on_cuda"), py::arg("param"), py::arg("grad"));
  m.def("build_info", &build_info);
  m.def("cuda_problem", &cuda::device_problem, py::arg("device"));
}
