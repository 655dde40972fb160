// Parameters of one element or a few, of any dtype: read and written by kernels, so that nobody has to convert them first.
#pragma once

#include "device.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

struct Scalars {
  void* data;
  DType dtype;

  MIRAGE_DEVICE float operator[](int i) const {
    switch (dtype) {
      case DType::f16: return to_float(static_cast<const f16*>(data)[i]);
      case DType::bf16: return to_float(static_cast<const bf16*>(data)[i]);
      case DType::f64: return float(static_cast<const double*>(data)[i]);
      default: return static_cast<const float*>(data)[i];
    }
  }

  MIRAGE_DEVICE void set(int i, float value) const {
    switch (dtype) {
      case DType::f16: static_cast<f16*>(data)[i] = from_float<f16>(value); return;
      case DType::bf16: static_cast<bf16*>(data)[i] = from_float<bf16>(value); return;
      case DType::f64: static_cast<double*>(data)[i] = value; return;
      default: static_cast<float*>(data)[i] = value;
    }
  }
};

inline Scalars scalars_of(const Tensor& t) { return {t.data, t.dtype}; }

// Sums of a block's threads, in thread 0 of each warp's order: the same bits every time. `room`: a float a warp.
template <int kThreads>
MIRAGE_DEVICE float sum_of_block(float x, float* room) {
  x = sum_of_warp(x);
  sync_block();  // room may still be read
  if (lane_index() == 0) room[warp_index()] = x;
  sync_block();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kLanes; ++warp) sum += room[warp];
  return sum;
}

}  // namespace mirage::cuda
