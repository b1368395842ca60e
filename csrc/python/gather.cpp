#include "tensor_watch.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace clara {
namespace python {
namespace {

// Interned once, so that attribute and dict look-ups compare addresses.
PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject* params = interned("params");
  PyObject* grad = interned("grad");
  PyObject* local_tensor = interned("_local_tensor");
  PyObject* data_ptr = interned("data_ptr");
  PyObject* dtype = interned("dtype");
  PyObject* device = interned("device");
  PyObject* shape = interned("shape");
  PyObject* stride = interned("stride");
  PyObject* is_neg = interned("is_neg");
};

// Leaked: interpreter shutdown must not free them before the module.
const Names& names() {
  static const Names* all = new Names;
  return *all;
}

// Takes over a new reference; null (with its Python error cleared) stays null.
py::object owned(PyObject* new_reference) {
  if (new_reference == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(new_reference);
}

const char* const kWatchedStates[] = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "path", "lr_scale"};

bool is_watched_state(PyObject* key) {
  if (!PyUnicode_Check(key)) return false;
  for (const char* name : kWatchedStates) {
    if (PyUnicode_CompareWithASCIIString(key, name) == 0) return true;
  }
  return false;
}

// Integers of a tuple into `out`; false if it is something else.
bool read_integers(PyObject* tuple, std::vector<int64_t>* out) {
  if (tuple == nullptr || !PyTuple_Check(tuple)) return false;
  out->resize(static_cast<size_t>(PyTuple_GET_SIZE(tuple)));
  for (size_t i = 0; i < out->size(); ++i) {
    (*out)[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i)));
  }
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// MetadataReader
// ---------------------------------------------------------------------------------------------------------------

MetadataReader::MetadataReader(bool use_exchange_api) {
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor");
  tensor_type_ = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type_ = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).ptr());
  if (!use_exchange_api) return;
  const py::object capsule = py::getattr(tensor, dlpack::kAttribute, py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) return;
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName);
  if (pointer == nullptr) {
    PyErr_Clear();
    return;
  }
  const auto* api = static_cast<const dlpack::ExchangeApi*>(pointer);
  while (api != nullptr && api->version.major > dlpack::kMajorVersion) api = api->older_version;
  if (api == nullptr || api->version.major != dlpack::kMajorVersion || api->tensor_from_object == nullptr) return;
  api_ = api;
  keep_api_alive_ = capsule;
}

bool MetadataReader::read(PyObject* object, Metadata* out) {
  py::object local;
  if (Py_TYPE(object) != parameter_type_ && Py_TYPE(object) != tensor_type_) {
    // A DTensor is a shell around the tensor that has this rank's memory.
    local = owned(PyObject_GetAttr(object, names().local_tensor));
    if (local) object = local.ptr();
    if (!PyObject_TypeCheck(object, tensor_type_)) return false;
  }
  // The shell keeps `local` alive.
  return api_ != nullptr ? read_from_api(object, out) : read_from_attributes(object, out);
}

bool MetadataReader::read_from_api(PyObject* object, Metadata* out) const {
  dlpack::Tensor tensor;
  if (api_->tensor_from_object(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  out->device = (static_cast<int64_t>(tensor.device.type) << 32) | static_cast<uint32_t>(tensor.device.id);
  out->dtype = (static_cast<int64_t>(tensor.dtype.code) << 32) | (tensor.dtype.bits << 16) | tensor.dtype.lanes;
  out->ndim = tensor.ndim;
  out->shape = tensor.shape;
  out->strides = tensor.strides;
  return true;
}

bool MetadataReader::read_from_attributes(PyObject* object, Metadata* out) {
  const py::object address = owned(PyObject_CallMethodNoArgs(object, names().data_ptr));
  const py::object dtype = owned(PyObject_GetAttr(object, names().dtype));
  const py::object device = owned(PyObject_GetAttr(object, names().device));
  const py::object shape = owned(PyObject_GetAttr(object, names().shape));
  const py::object strides = owned(PyObject_CallMethodNoArgs(object, names().stride));
  if (!address || !dtype || !device || !read_integers(shape.ptr(), &shape_) ||
      !read_integers(strides.ptr(), &strides_)) {
    return false;
  }
  out->data = PyLong_AsVoidPtr(address.ptr());
  // There is one object per dtype; devices with equal hash are equal (type and index fit into it).
  out->dtype = reinterpret_cast<int64_t>(dtype.ptr());
  out->device = static_cast<int64_t>(PyObject_Hash(device.ptr()));
  out->ndim = static_cast<int32_t>(shape_.size());
  out->shape = shape_.data();
  out->strides = strides_.data();
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

// ---------------------------------------------------------------------------------------------------------------
// TensorWatch: remember
// ---------------------------------------------------------------------------------------------------------------

TensorWatch::TensorWatch(py::list param_groups, py::dict state, bool use_exchange_api) : reader_(use_exchange_api) {
  const auto check = [](bool watchable, const char* what) {
    if (!watchable) throw py::value_error(std::string("cannot watch ") + what + " of the optimizer: not a plain tensor");
  };
  for (const py::handle group : param_groups) {
    std::vector<Param> params;
    for (const py::handle object : py::list(group["params"])) {
      Param param{object.ptr(), {}, false, {}, nullptr, 0};
      check(remember(object.ptr(), &param.tensor), "a parameter");
      const py::object grad = object.attr("grad");
      param.has_grad = !grad.is_none();
      if (param.has_grad) check(remember(grad.ptr(), &param.grad), "a gradient");
      params.push_back(std::move(param));
    }
    groups_.push_back(std::move(params));
  }
  for (const auto& [param, values] : state) {
    ParamState param_state{param.ptr(), {}};
    for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(values)) {
      Entry entry{key.ptr(), is_watched_state(key.ptr()), {}};
      if (entry.watched) check(remember(value.ptr(), &entry.tensor), "the state");
      param_state.entries.push_back(entry);
    }
    states_.push_back(std::move(param_state));
  }
}

bool TensorWatch::remember(PyObject* object, Tensor* tensor) {
  MetadataReader::Metadata seen;
  if (!reader_.read(object, &seen)) return false;
  *tensor = {seen.data, seen.device, seen.dtype, seen.ndim, dims_.size()};
  dims_.insert(dims_.end(), seen.shape, seen.shape + seen.ndim);
  dims_.insert(dims_.end(), seen.strides, seen.strides + seen.ndim);
  return true;
}

void TensorWatch::route(int64_t group, int64_t param, std::shared_ptr<GradSlots> slots, int64_t row) {
  Param& routed = groups_.at(static_cast<size_t>(group)).at(static_cast<size_t>(param));
  if (row < 0 || row >= static_cast<int64_t>(slots->addresses.size())) {
    throw py::index_error("row outside of the bucket");
  }
  routed.slots = std::move(slots);
  routed.row = row;
}

// ---------------------------------------------------------------------------------------------------------------
// TensorWatch: compare
// ---------------------------------------------------------------------------------------------------------------

bool TensorWatch::unchanged(py::list param_groups, py::dict state) {
  if (same_params(param_groups.ptr()) && same_state(state.ptr())) return true;
  release_gradients();
  return false;
}

void TensorWatch::release_gradients() {
  for (const std::vector<Param>& group : groups_) {
    for (const Param& param : group) {
      if (param.slots != nullptr) param.slots->owners[static_cast<size_t>(param.row)] = {};
    }
  }
}

bool TensorWatch::same(PyObject* object, const Tensor& tensor, bool compare_address, const void** address) {
  MetadataReader::Metadata seen;
  if (!reader_.read(object, &seen)) return false;
  if (address != nullptr) *address = seen.data;
  if (compare_address && seen.data != tensor.data) return false;
  if (seen.device != tensor.device || seen.dtype != tensor.dtype || seen.ndim != tensor.ndim) return false;
  const int64_t* dims = dims_.data() + tensor.dims;
  for (int32_t i = 0; i < seen.ndim; ++i) {
    if (seen.shape[i] != dims[i] || seen.strides[i] != dims[seen.ndim + i]) return false;
  }
  return true;
}

bool TensorWatch::same_params(PyObject* param_groups) {
  if (PyList_GET_SIZE(param_groups) != static_cast<Py_ssize_t>(groups_.size())) return false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(g));
    PyObject* list = PyDict_Check(group) ? PyDict_GetItemWithError(group, names().params) : nullptr;
    if (list == nullptr || !PyList_Check(list) ||
        PyList_GET_SIZE(list) != static_cast<Py_ssize_t>(groups_[g].size())) {
      PyErr_Clear();
      return false;
    }
    for (size_t i = 0; i < groups_[g].size(); ++i) {
      Param& param = groups_[g][i];
      // Reading a gradient may run Python code (tensor subclasses), so the list may have shrunk.
      if (static_cast<Py_ssize_t>(i) >= PyList_GET_SIZE(list)) return false;
      PyObject* object = PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i));
      if (object != param.object) return false;
      const py::object alive = py::reinterpret_borrow<py::object>(object);
      if (!same(object, param.tensor, true, nullptr) || !same_grad(param)) return false;
    }
  }
  return true;
}

py::list TensorWatch::params_with_grad(py::list param_groups) const {
  py::list found;
  for (size_t g = 0; g < groups_.size(); ++g) {
    const py::list params = param_groups[g][py::handle(names().params)];
    for (size_t i = 0; i < groups_[g].size(); ++i) {
      if (groups_[g][i].has_grad) found.append(params[i]);
    }
  }
  return found;
}

bool TensorWatch::same_grad(Param& param) {
  const py::object grad = owned(PyObject_GetAttr(param.object, names().grad));
  if (!grad) return false;
  if (!param.has_grad || grad.is_none()) return !param.has_grad && grad.is_none();
  const void* address = nullptr;
  if (!same(grad.ptr(), param.grad, false, &address)) return false;
  // Zeros of forward-mode autograd have no memory.
  if (address == nullptr && param.grad.data != nullptr) return false;
  const int64_t* shape = dims_.data() + param.grad.dims;
  if (std::all_of(shape, shape + param.grad.ndim, [](int64_t size) { return size == 1; })) {
    // A view that stands for the negative of its memory; with more elements it would show in the strides.
    const py::object negative = owned(PyObject_CallMethodNoArgs(grad.ptr(), names().is_neg));
    if (negative.ptr() != Py_False) return false;
  }
  if (param.slots != nullptr) {
    param.slots->addresses[static_cast<size_t>(param.row)] = address;
    param.slots->owners[static_cast<size_t>(param.row)] = grad;
  }
  return true;
}

bool TensorWatch::same_state(PyObject* state) {
  if (PyDict_Size(state) != static_cast<Py_ssize_t>(states_.size())) return false;
  Py_ssize_t position = 0;
  PyObject *param = nullptr, *values = nullptr;
  for (const ParamState& expected : states_) {
    if (!PyDict_Next(state, &position, &param, &values) || param != expected.param || !PyDict_Check(values) ||
        PyDict_Size(values) != static_cast<Py_ssize_t>(expected.entries.size())) {
      return false;
    }
    Py_ssize_t entry_position = 0;
    PyObject *key = nullptr, *value = nullptr;
    for (const Entry& entry : expected.entries) {
      if (!PyDict_Next(values, &entry_position, &key, &value) || key != entry.key) return false;
      if (entry.watched && !same(value, entry.tensor, true, nullptr)) return false;
    }
  }
  return true;
}

}  // namespace python
}  // namespace clara
