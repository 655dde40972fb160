// Tensors from Python by DLPack capsule: pointer, sizes, strides and element type come from the object that owns the
// memory, so no Python call can hand over a size that its buffer does not have.
#pragma once

#include <pybind11/pybind11.h>

#include "mirage/tensor.h"

namespace mirage::python {

// The layout of DLPack's unversioned structs (https://dmlc.github.io/dlpack), which is frozen.
struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

constexpr int kDeviceCpu = 1, kDeviceCuda = 2;

// The capsule keeps the memory alive for as long as the caller holds it; it is looked at, not consumed.
inline Tensor from_dlpack(const char* argument, const pybind11::capsule& capsule, int device = kDeviceCpu) {
  if (!capsule.name() || std::string(capsule.name()) != "dltensor") {
    fail(argument, "a DLPack capsule named dltensor", capsule.name() ? capsule.name() : "an unnamed capsule");
  }
  const DLTensor& source = *capsule.get_pointer<DLTensor>();  // DLManagedTensor begins with its DLTensor
  if (source.device.type != device) {
    fail(argument, "DLPack device type " + std::to_string(device), std::to_string(source.device.type));
  }
  if (source.ndim > kMaxDims) {
    fail(argument, "at most " + std::to_string(kMaxDims) + " dimensions", std::to_string(source.ndim));
  }
  Tensor t;
  t.data = static_cast<char*>(source.data) + source.byte_offset;
  t.ndim = source.ndim;
  const int code = source.dtype.code, bits = source.dtype.bits;
  constexpr int kFloat = 2, kBfloat = 4;
  if (code == kFloat && bits == 32) t.dtype = DType::f32;
  else if (code == kFloat && bits == 64) t.dtype = DType::f64;
  else if (code == kFloat && bits == 16) t.dtype = DType::f16;
  else if (code == kBfloat && bits == 16) t.dtype = DType::bf16;
  else fail(argument, "a float32, float64, float16 or bfloat16 tensor",
            "DLPack type code " + std::to_string(code) + " of " + std::to_string(bits) + " bits");
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    t.size[d] = source.shape[d];
    t.stride[d] = source.strides ? source.strides[d] : expected;
    expected *= t.size[d];
  }
  return t;
}

// Merges the last dimensions of a contiguous tensor until `ndim` are left; returns tensors of other strides unchanged.
inline Tensor flattened(const Tensor& t, int ndim) {
  if (t.ndim <= ndim || !t.is_contiguous()) return t;
  Tensor flat = t;
  flat.ndim = ndim;
  for (int d = ndim; d < t.ndim; ++d) flat.size[ndim - 1] *= t.size[d];
  int64_t expected = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    flat.stride[d] = expected;
    expected *= flat.size[d];
  }
  return flat;
}

// The weight of a convolution as a matrix.
inline Tensor matrix_from_dlpack(const char* argument, const pybind11::capsule& capsule, int device = kDeviceCpu) {
  return flattened(from_dlpack(argument, capsule, device), 2);
}

}  // namespace mirage::python
