// The part of the DLPack C exchange API (DLPack 1.2 and later minor versions) that reading a tensor's metadata takes.
// Layout as published at https://dmlc.github.io/dlpack/latest/c_api.html; functions that are not called are void*.
#pragma once

#include <cstdint>

namespace clara::python::dlpack {

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* older_version;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  // Borrowed metadata, valid as long as the object is and is not changed; 0 on success. May be null.
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsuleName = "dlpack_exchange_api";

}  // namespace clara::python::dlpack
