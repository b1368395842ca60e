#include "gather.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <tuple>

#include "../cpu/cpu_backend.h"
#include "../cuda/cuda_backend.h"
#include "dlpack_exchange.h"

namespace py = pybind11;

namespace clara::python {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// Python objects
// ---------------------------------------------------------------------------------------------------------------

// Interned once, so that look-ups compare addresses; leaked, because interpreter shutdown must not free them.
struct Names {
  static PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

  PyObject* params = interned("params");
  PyObject* amsgrad = interned("amsgrad");
  PyObject* grad = interned("grad");
  PyObject* is_neg = interned("is_neg");
  PyObject* local_tensor = interned("_local_tensor");
  PyObject* spec = interned("_spec");
  PyObject* placements = interned("placements");
  PyObject* dtensor_module = interned("torch.distributed.tensor");
  PyObject* dtensor = interned("DTensor");

  PyObject* step = interned("step");
  PyObject* lr_scale = interned("lr_scale");
  PyObject* exp_avg = interned("exp_avg");
  PyObject* exp_avg_sq = interned("exp_avg_sq");
  PyObject* max_exp_avg_sq = interned("max_exp_avg_sq");
  PyObject* path = interned("path");
  PyObject* walk[kWalkScalars] = {interned("walk_moment_sq"), interned("walk_path_moment"), interned("walk_path_sq"),
                                  interned("walk_grad_peak"), interned("walk_cosine"), interned("walk_cosine_sq"),
                                  interned("walk_cosine_lag")};
};

const Names& names() {
  static const Names* all = new Names;
  return *all;
}

// Takes over a new reference; null (with its Python error cleared) stays null.
py::object owned(PyObject* new_reference) {
  if (new_reference == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(new_reference);
}

py::object attribute(const py::object& of, PyObject* name) { return of ? owned(PyObject_GetAttr(of.ptr(), name)) : of; }

// Borrowed; null without an error where there is none.
PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr) PyErr_Clear();
  return value;
}

// The state by the address of the parameter. The dict itself would hash parameters in Python code, which takes longer
// than all the rest; tensors are equal as keys only if they are identical.
class StateTable {
 public:
  explicit StateTable(PyObject* state) {
    size_t slots = 16;
    while (slots < 2 * static_cast<size_t>(PyDict_Size(state))) slots *= 2;
    entries_.resize(slots);
    Py_ssize_t position = 0;
    for (Entry entry; PyDict_Next(state, &position, &entry.param, &entry.values);) *slot_of(entry.param) = entry;
  }

  // Borrowed; null where there is none.
  PyObject* find(PyObject* param) { return slot_of(param)->values; }

 private:
  struct Entry {
    PyObject* param = nullptr;
    PyObject* values = nullptr;
  };

  Entry* slot_of(PyObject* param) {
    size_t i = (reinterpret_cast<uintptr_t>(param) >> 4) * 0x9E3779B97F4A7C15u >> 20;
    while (true) {
      Entry& entry = entries_[i++ & (entries_.size() - 1)];
      if (entry.param == param || entry.param == nullptr) return &entry;
    }
  }

  std::vector<Entry> entries_;
};

// ---------------------------------------------------------------------------------------------------------------
// Tensors
// ---------------------------------------------------------------------------------------------------------------

// What a raw pointer to a tensor depends on.
struct View {
  void* data;
  Device device;
  DType dtype;
  int32_t ndim;
  const int64_t* shape;  // valid as long as the tensor
  const int64_t* strides;
  int64_t numel;
};

// Reads tensors through torch's DLPack exchange API (torch 2.10), which takes tens of nanoseconds and runs no Python.
class Reader {
 public:
  static const Reader& instance() {
    static const Reader* reader = new Reader;
    return *reader;
  }

  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == parameter_type_ || Py_TYPE(object) == tensor_type_;
  }

  // False, without a Python error, where the plain tensor has no memory that the core could work on.
  bool read(PyObject* plain, View* out) const {
    dlpack::Tensor tensor;
    if (api_->tensor_from_object(plain, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    constexpr int32_t kCpu = 1, kCuda = 2;
    if (tensor.device.type != kCpu && tensor.device.type != kCuda) return false;
    out->device = {tensor.device.type == kCuda, tensor.device.type == kCuda ? tensor.device.id : -1};
    if (!read_dtype(tensor.dtype, &out->dtype)) return false;
    out->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    out->ndim = tensor.ndim;
    out->shape = tensor.shape;
    out->strides = tensor.strides;
    out->numel = 1;
    for (int32_t i = 0; i < tensor.ndim; ++i) out->numel *= tensor.shape[i];
    return tensor.data != nullptr || out->numel == 0;
  }

 private:
  Reader() {
    const py::module_ torch = py::module_::import("torch");
    // Never released, like the types.
    tensor_type_ = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    parameter_type_ = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
    py::object capsule = py::getattr(torch.attr("Tensor"), dlpack::kAttribute, py::none());
    if (PyCapsule_CheckExact(capsule.ptr())) {
      void* api = PyCapsule_GetPointer(capsule.release().ptr(), dlpack::kCapsuleName);
      api_ = static_cast<const dlpack::ExchangeApi*>(api);
      PyErr_Clear();
    }
    while (api_ != nullptr && api_->version.major > dlpack::kMajorVersion) api_ = api_->older_version;
    if (api_ == nullptr || api_->version.major != dlpack::kMajorVersion || api_->tensor_from_object == nullptr) {
      throw std::runtime_error("the compiled core reads tensors through torch's DLPack exchange API: torch >= 2.10");
    }
  }

  static bool read_dtype(const dlpack::DataType& dtype, DType* out) {
    constexpr uint8_t kFloat = 2, kBFloat = 4;
    if (dtype.lanes != 1) return false;
    if (dtype.code == kFloat && dtype.bits == 32) return *out = DType::kFloat32, true;
    if (dtype.code == kFloat && dtype.bits == 64) return *out = DType::kFloat64, true;
    if (dtype.code == kFloat && dtype.bits == 16) return *out = DType::kFloat16, true;
    if (dtype.code == kBFloat && dtype.bits == 16) return *out = DType::kBFloat16, true;
    return false;
  }

  PyTypeObject *tensor_type_, *parameter_type_;
  const dlpack::ExchangeApi* api_ = nullptr;
};

// DTensor, or null as long as nobody has imported it: then there are none.
PyTypeObject* dtensor_type() {
  static PyTypeObject* type = nullptr;
  if (type == nullptr) {
    const py::object found = attribute(owned(PyImport_GetModule(names().dtensor_module)), names().dtensor);
    // A new reference, never released.
    if (found && PyType_Check(found.ptr())) type = reinterpret_cast<PyTypeObject*>(found.inc_ref().ptr());
  }
  return type;
}

bool is_dtensor(PyObject* object) { return Py_TYPE(object) == dtensor_type(); }

// The plain tensor with this rank's memory: the object itself or what a DTensor wraps. Null for all others.
py::object plain_tensor(PyObject* object) {
  py::object tensor = py::reinterpret_borrow<py::object>(object);
  if (Reader::instance().is_plain(object)) return tensor;
  if (!is_dtensor(object)) return {};
  tensor = attribute(tensor, names().local_tensor);
  return tensor && Reader::instance().is_plain(tensor.ptr()) ? tensor : py::object();
}

// Both plain, or DTensors that are placed alike: a sum that is still to be reduced has the shape of its parameter too.
bool placed_alike(PyObject* param, PyObject* grad) {
  if (is_dtensor(param) != is_dtensor(grad)) return false;
  if (!is_dtensor(param)) return true;
  const auto placements = [](PyObject* of) {
    return attribute(attribute(py::reinterpret_borrow<py::object>(of), names().spec), names().placements);
  };
  const py::object of_param = placements(param), of_grad = placements(grad);
  const int equal = of_param && of_grad ? PyObject_RichCompareBool(of_param.ptr(), of_grad.ptr(), Py_EQ) : 0;
  if (equal < 0) PyErr_Clear();
  return equal > 0;
}

// Without gaps: some order of the dimensions is contiguous.
bool is_dense(const View& tensor) {
  for (int64_t expected = 1; expected < tensor.numel;) {
    int32_t i = tensor.ndim - 1;
    while (i >= 0 && !(tensor.strides[i] == expected && tensor.shape[i] > 1)) --i;
    if (i < 0) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

bool same_layout(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
    if (a.strides[i] != b.strides[i] && a.shape[i] > 1 && a.numel > 0) return false;
  }
  return true;
}

DType moment_type(const View& param) { return param.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Sets run and kept of the record to what the path's shape says; false if it is no path of such a parameter. A shard has
// the runs of the whole tensor: where it would not, state.py gives it its whole path. See docs/algorithm.md.
bool read_sample(const View& param, const View& path, TensorRecord* record) {
  constexpr int64_t kMaxRun = 1024;
  record->run = record->kept = 1;
  if (same_layout(param, path)) return true;
  if (param.numel == 0) return path.numel == 0;  // an empty shard
  if (param.ndim == 0 || path.numel == 0 || !is_dense(path)) return false;
  const bool one_row = param.ndim == 1;
  const int64_t rows = one_row ? 1 : param.shape[0], row = param.numel / rows;
  if (path.ndim != (one_row ? 1 : 2) || (!one_row && path.shape[0] != rows)) return false;
  if (rows > 1 && (param.strides[0] != row || path.strides[0] != path.numel / rows)) return false;
  const int64_t run = std::min(row & -row, kMaxRun);
  if (path.numel / rows % (row / run) != 0) return false;
  const int64_t kept = path.numel / rows / (row / run);
  if (kept >= run || (kept & (kept - 1)) != 0) return false;
  record->run = static_cast<int32_t>(run);
  record->kept = static_cast<int32_t>(kept);
  return true;
}

// ---------------------------------------------------------------------------------------------------------------
// Gather
// ---------------------------------------------------------------------------------------------------------------

struct Candidate {
  Location location;
  PyObject* param;                     // as the user has it
  PyObject *plain_param, *plain_grad;  // null: has none
  bool amsgrad;
  bool regular;
  // Of a regular one:
  View view, grad;
  TensorRecord record;
};

class Gatherer {
 public:
  Gatherer() : owners_(std::make_shared<Owners>()) {}

  // First of all, because this may run code of the user's (torch function modes, comparison of placements): whatever
  // that changes, all that was found has an owner.
  void find_gradients(const py::list& param_groups) {
    const Reader& reader = Reader::instance();
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups.ptr()); ++g) {
      const py::object group = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(param_groups.ptr(), g));
      if (!PyDict_Check(group.ptr())) throw py::type_error("param_groups must hold dicts");
      const py::object params = py::reinterpret_borrow<py::object>(item(group.ptr(), names().params));
      if (!params || !(PyList_Check(params.ptr()) || PyTuple_Check(params.ptr()))) {
        throw py::type_error("the params of a group must be a list");
      }
      PyObject* const amsgrad = item(group.ptr(), names().amsgrad);
      const int is_amsgrad = amsgrad == nullptr ? 0 : PyObject_IsTrue(amsgrad);
      if (is_amsgrad < 0) throw py::error_already_set();
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i) {
        py::object param = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(params.ptr(), i));
        py::object grad = owned(PyObject_GetAttr(param.ptr(), names().grad));
        if (!grad || grad.is_none()) continue;
        Candidate candidate{};
        candidate.location = {g, i};
        candidate.param = param.ptr();
        candidate.amsgrad = is_amsgrad != 0;
        if (reader.is_plain(param.ptr()) && reader.is_plain(grad.ptr())) {
          candidate.plain_param = param.ptr();
          candidate.plain_grad = grad.ptr();
        } else if (placed_alike(param.ptr(), grad.ptr())) {
          candidate.plain_param = keep(plain_tensor(param.ptr()));
          candidate.plain_grad = keep(plain_tensor(grad.ptr()));
        }
        keep(std::move(param));
        keep(std::move(grad));
        candidates_.push_back(candidate);
      }
    }
  }

  // Runs no code of anybody's.
  void read_state(const py::dict& state, const std::optional<py::list>& scales) {
    StateTable table(state.ptr());
    std::vector<View> one_scale;  // by device
    for (const py::handle scale : scales.value_or(py::list())) {
      if (View view; Reader::instance().is_plain(scale.ptr()) && Reader::instance().read(scale.ptr(), &view)) {
        one_scale.push_back(view);
      }
    }
    const auto has_the_scale = [&](const Candidate& candidate) {
      return std::any_of(one_scale.begin(), one_scale.end(), [&](const View& scale) {
        return scale.device == candidate.view.device && scale.data == candidate.record.lr_scale;
      });
    };
    constexpr size_t kEntriesOfMost = kWalkScalars + 5;  // step, scale, two moments, path
    owners_->reserve(owners_->size() + kEntriesOfMost * candidates_.size());
    for (Candidate& candidate : candidates_) {
      PyObject* values = table.find(candidate.param);
      candidate.regular = candidate.plain_param != nullptr && candidate.plain_grad != nullptr && values != nullptr &&
                          PyDict_Check(values) && read(values, &candidate) && (!scales || has_the_scale(candidate));
    }
  }

  // Views that stand for the negative of their memory: imaginary parts of conjugates. Of more than one element they have
  // gaps, and are irregular for that. (One whose gaps as_strided hides is not found: to ask every tensor would cost all
  // steps a tenth of the host's time.)
  void drop_negatives() {
    for (Candidate& candidate : candidates_) {
      if (!candidate.regular || candidate.record.numel != 1) continue;
      for (PyObject* tensor : {candidate.plain_param, candidate.plain_grad}) {
        if (owned(PyObject_CallMethodNoArgs(tensor, names().is_neg)).ptr() != Py_False) candidate.regular = false;
      }
    }
  }

  void drop_overlaps() {
    struct Range {
      const char *begin, *end;
      Candidate* candidate;
    };
    std::vector<Range> ranges;
    for (Candidate& c : candidates_) {
      if (!c.regular) continue;
      // Without elements there is no memory. The Python object's own address stands for it, so that one that is listed
      // twice overlaps with itself: its state must not be stepped twice at once.
      const void* begin = c.view.numel == 0 ? c.param : c.view.data;
      const int64_t bytes = std::max<int64_t>(1, c.view.numel * element_size(c.view.dtype));
      ranges.push_back({static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes, &c});
    }
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (size_t i = 1, last = 0; i < ranges.size(); ++i) {  // `last`: of those before, the one that reaches furthest
      if (ranges[i].begin < ranges[last].end && ranges[i].candidate->view.device == ranges[last].candidate->view.device) {
        ranges[i].candidate->regular = ranges[last].candidate->regular = false;
      }
      if (ranges[i].end > ranges[last].end) last = i;
    }
  }

  Gathering result() {
    Gathering all;
    std::map<std::tuple<bool, int32_t, DType, DType>, GatheredBucket> buckets;
    for (const Candidate& c : candidates_) {
      if (!c.regular) {
        all.irregular.push_back(c.location);
        continue;
      }
      const Device device = c.view.device;
      GatheredBucket& bucket = buckets[{device.is_cuda, device.index, c.view.dtype, c.grad.dtype}];
      if (bucket.owners == nullptr) bucket = {device, c.view.dtype, c.grad.dtype, {}, {}, {}, {}, owners_};
      bucket.records.push_back(c.record);
      bucket.grads.push_back(c.grad.data);
      bucket.locations.push_back(c.location);
      bucket.params.push_back(c.param);
    }
    for (auto& [key, bucket] : buckets) all.buckets.push_back(std::move(bucket));
    return all;
  }

 private:
  PyObject* keep(py::object object) {
    if (!object) return nullptr;
    owners_->push_back(std::move(object));
    return owners_->back().ptr();
  }

  bool read(PyObject* values, Candidate* c) {
    const Reader& reader = Reader::instance();
    if (!reader.read(c->plain_param, &c->view) || !reader.read(c->plain_grad, &c->grad)) return false;
    const View &param = c->view, &grad = c->grad;
    if (!(grad.device == param.device) || !same_layout(param, grad) || !is_dense(param)) return false;
    if (!supports(param.device.is_cuda, param.dtype, grad.dtype)) return false;

    TensorRecord& record = c->record;
    record.param = param.data;
    record.numel = param.numel;
    record.group = c->location.first;
    const Names& n = names();
    for (int i = 0; i < kWalkScalars; ++i) {
      if (!read_scalar(values, n.walk[i], param, &record.walk[i])) return false;
    }
    View path;
    if (!read_entry(values, n.path, param, moment_type(param), &path) || !read_sample(param, path, &record)) return false;
    record.path = path.data;
    return read_scalar(values, n.step, param, &record.step) &&
           read_scalar(values, n.lr_scale, param, &record.lr_scale) &&
           read_moment(values, n.exp_avg, param, &record.exp_avg) &&
           read_moment(values, n.exp_avg_sq, param, &record.exp_avg_sq) &&
           (!c->amsgrad || read_moment(values, n.max_exp_avg_sq, param, &record.max_exp_avg_sq));
  }

  // An entry on the parameter's device.
  bool read_entry(PyObject* values, PyObject* name, const View& param, DType dtype, View* out) {
    PyObject* object = item(values, name);
    if (object == nullptr) return false;
    PyObject* plain = keep(plain_tensor(object));
    return plain != nullptr && Reader::instance().read(plain, out) && out->device == param.device && out->dtype == dtype;
  }

  bool read_moment(PyObject* values, PyObject* name, const View& param, void** out) {
    View moment;
    if (!read_entry(values, name, param, moment_type(param), &moment) || !same_layout(param, moment)) return false;
    *out = moment.data;
    return true;
  }

  bool read_scalar(PyObject* values, PyObject* name, const View& param, float** out) {
    View scalar;
    if (!read_entry(values, name, param, DType::kFloat32, &scalar) || scalar.ndim != 0) return false;
    *out = static_cast<float*>(scalar.data);
    return true;
  }

  std::shared_ptr<Owners> owners_;
  std::vector<Candidate> candidates_;
};

}  // namespace

bool supports(bool on_cuda, DType param, DType grad) {
  return on_cuda ? cuda::supports(param, grad) : cpu::supports(param, grad);
}

Gathering gather(const py::list& param_groups, const py::dict& state, const std::optional<py::list>& scales) {
  Gatherer gatherer;
  gatherer.find_gradients(param_groups);
  gatherer.read_state(state, scales);
  gatherer.drop_negatives();
  gatherer.drop_overlaps();
  return gatherer.result();
}

}  // namespace clara::python
