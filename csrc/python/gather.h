// Gathers what a step works on: one walk over an optimizer's groups, parameters, gradients and state, at every step.
// Nothing is remembered from one step to the next.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../tensor_list.h"

namespace clara::python {

// Whether the core serves this combination of storage types.
bool supports(bool on_cuda, DType param, DType grad);

struct Device {
  bool is_cuda;
  int32_t index;  // -1: the CPU

  bool operator==(const Device& other) const { return is_cuda == other.is_cuda && index == other.index; }
};

using Location = std::pair<int64_t, int64_t>;  // group, parameter

// References to everything that records point to. While the core works the GIL is free, and another thread may drop a
// gradient or replace a state.
using Owners = std::vector<pybind11::object>;

// Tensors that share device and storage types.
struct GatheredBucket {
  Device device;
  DType param_dtype, grad_dtype;
  std::vector<TensorRecord> records;  // their chunks are not numbered yet
  std::vector<const void*> grads;
  std::vector<Location> locations;
  std::vector<PyObject*> params;  // the parameter objects
  std::shared_ptr<const Owners> owners;
};

struct Gathering {
  std::vector<GatheredBucket> buckets;  // by device, parameter type, gradient type
  std::vector<Location> irregular;      // have a gradient, but cannot be stepped by the core as they are
};

// Note [Regular tensors]: a parameter with a gradient is regular if
// - parameter, gradient and state are plain tensors, or DTensors around plain tensors (with the same placements), with
//   memory, on one device, of types that the core serves;
// - the state is complete, the path in a layout that the core knows, the scale one of `scales` if these are given;
// - parameter, gradient and everything parameter-shaped have the same dense layout, and none stands for the negative
//   of its memory;
// - no other regular parameter has a part in its memory.
//
// `param_groups` and `state` are the optimizer's own; `scales` hold the one scale of all tensors (Global), one tensor per
// device.
Gathering gather(const pybind11::list& param_groups, const pybind11::dict& state,
                 const std::optional<pybind11::list>& scales);

}  // namespace clara::python
