// The argument checks of dynamic_depthwise_conv2d, for every implementation.
#pragma once

#include <string>

#include "mirage/tensor.h"

namespace mirage::depthwise {

inline void check_like(const char* argument, const Tensor& t, const Tensor& model) {
  check_shape(argument, t, {model.size[0], model.size[1], model.size[2], model.size[3]});
  check_dtype(argument, t, model.dtype);
}

inline void check_output(const char* argument, const Tensor& t, const Tensor& model) {
  check_like(argument, t, model);
  if (t.numel() > 0) check_contiguous(argument, t);
}

inline void check_inputs(const Tensor& x, const Tensor& weight) {
  check_ndim("x", x, 4);
  check_ndim("weight", weight, 4);
  const int64_t k = weight.size[2];
  if (k < 3 || k > 11 || k % 2 == 0) fail("weight", "a kernel size of 3, 5, 7, 9 or 11", std::to_string(k));
  check_shape("weight", weight, {x.size[0], x.size[1], k, k});
  check_dtype("weight", weight, x.dtype);
}

// An output that the caller may decline by passing a tensor of shape [0].
inline bool is_wanted(const Tensor& t) { return t.ndim != 1 || t.size[0] != 0; }

inline void check_optional_output(const char* argument, const Tensor& t, const Tensor& model) {
  if (is_wanted(t)) check_output(argument, t, model);
}

}  // namespace mirage::depthwise
