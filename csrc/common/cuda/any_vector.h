// Vectors whose dtype only the caller knows: read and written by kernels as they are, so that nobody has to convert them.
#pragma once

#include "device.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

struct AnyVector {
  void* data;
  DType dtype;

  MIRAGE_DEVICE float operator[](int64_t i) const {
    switch (dtype) {
      case DType::f16: return to_float(static_cast<const f16*>(data)[i]);
      case DType::bf16: return to_float(static_cast<const bf16*>(data)[i]);
      case DType::f64: return float(static_cast<const double*>(data)[i]);
      default: return static_cast<const float*>(data)[i];
    }
  }

  MIRAGE_DEVICE void set(int64_t i, float value) const {
    switch (dtype) {
      case DType::f16: static_cast<f16*>(data)[i] = from_float<f16>(value); return;
      case DType::bf16: static_cast<bf16*>(data)[i] = from_float<bf16>(value); return;
      case DType::f64: static_cast<double*>(data)[i] = value; return;
      default: static_cast<float*>(data)[i] = value;
    }
  }
};

inline AnyVector vector_of(const Tensor& t) { return {t.data, t.dtype}; }

}  // namespace mirage::cuda
