// Guards the cached pointers of the core: tells at every step whether anything but gradients' addresses has changed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "dlpack_exchange.h"

namespace clara {
namespace python {

// Reads what raw pointers to a tensor depend on: through torch's DLPack exchange API (tens of nanoseconds), or through
// the tensor's Python attributes where that API is missing (torch 2.9).
class MetadataReader {
 public:
  struct Metadata {
    const void* data = nullptr;
    int64_t device = 0;  // an encoding; only equality means something
    int64_t dtype = 0;   // likewise
    int32_t ndim = 0;
    const int64_t* shape = nullptr;    // valid until the next read, and as long as the tensor
    const int64_t* strides = nullptr;  // likewise
  };

  // `use_exchange_api` false forces the attributes.
  explicit MetadataReader(bool use_exchange_api);

  // False, without a Python error, if `object` is not a tensor with memory of its own.
  bool read(PyObject* object, Metadata* out);

  bool uses_exchange_api() const { return api_ != nullptr; }

 private:
  bool read_from_api(PyObject* object, Metadata* out) const;
  bool read_from_attributes(PyObject* object, Metadata* out);

  const dlpack::ExchangeApi* api_ = nullptr;
  pybind11::object keep_api_alive_;
  PyTypeObject* tensor_type_;
  PyTypeObject* parameter_type_;
  std::vector<int64_t> shape_, strides_;
};

// Where the watch leaves the gradients of a bucket. While the core reads them the GIL is free, and another thread may
// drop or replace a gradient; so each has an owner from the check until the core has read it.
struct GradSlots {
  std::vector<const void*> addresses;
  std::vector<pybind11::object> owners;  // null outside of a step, and where somebody else owns the gradient

  void add(const void* address) {
    addresses.push_back(address);
    owners.emplace_back();
  }
  void release() {
    for (pybind11::object& owner : owners) owner = {};
  }
};

// Note [Stale pointers]: the watch keeps no tensor alive, beyond the gradients of a step that is being taken. At every
// step it walks the optimizer's param groups and state as they are then, so every tensor that it looks at is alive and
// is the one that a fresh walk would have found; what it compares (address, dtype, device, shape, strides) is all that
// the cached records were made from. An object that died and was replaced by another at the same place with the same
// metadata needs no new record.
class TensorWatch {
 public:
  // `param_groups`: the optimizer's list of dicts; `state`: its dict of dicts. Remembers both as they are.
  // Raises ValueError if they hold something that cannot be watched.
  TensorWatch(pybind11::list param_groups, pybind11::dict state, bool use_exchange_api);

  // The gradient of this parameter goes to (*slots)[row] at each successful check.
  void route(int64_t group, int64_t param, std::shared_ptr<GradSlots> slots, int64_t row);

  // True if nothing but addresses of gradients has changed; then the routed slots own the current ones.
  bool unchanged(pybind11::list param_groups, pybind11::dict state);

  // The parameters that have gradients, right after `unchanged` has been true for the same groups.
  pybind11::list params_with_grad(pybind11::list param_groups) const;

  bool uses_exchange_api() const { return reader_.uses_exchange_api(); }

 private:
  struct Tensor {
    const void* data;
    int64_t device, dtype;
    int32_t ndim;
    size_t dims;  // index of its shape, then strides, in dims_
  };
  struct Param {
    PyObject* object;  // identity only
    Tensor tensor;
    bool has_grad;
    Tensor grad;
    std::shared_ptr<GradSlots> slots;  // null: nobody wants its gradient
    int64_t row;
  };
  struct Entry {          // of the state of one parameter
    PyObject* key;        // identity only
    bool watched;         // one of the optimizer's own tensors
    Tensor tensor;
  };
  struct ParamState {
    PyObject* param;  // identity only
    std::vector<Entry> entries;
  };

  bool remember(PyObject* object, Tensor* tensor);
  bool same(PyObject* object, const Tensor& tensor, bool compare_address, const void** address);
  bool same_params(PyObject* param_groups);
  bool same_grad(Param& param);
  bool same_state(PyObject* state);
  void release_gradients();

  MetadataReader reader_;
  std::vector<int64_t> dims_;
  std::vector<std::vector<Param>> groups_;
  std::vector<ParamState> states_;
};

}  // namespace python
}  // namespace clara
