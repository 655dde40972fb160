// The argument checks of dense_conv2d, for every implementation.
#pragma once

#include "mirage/tensor.h"

namespace mirage::dense_conv {

inline void check_inputs(const Tensor& x, const Tensor& weight) {
  check_ndim("x", x, 4);
  check_ndim("weight", weight, 3);
  if (weight.size[2] != 1 && weight.size[2] != 9) fail("weight", "1 or 9 taps", shape_of(weight));
  check_dense("weight", weight, {weight.size[0], x.size[1], weight.size[2]});
}

inline void check_forward(const Tensor& x, const Tensor& weight, const Tensor& y) {
  check_inputs(x, weight);
  check_dense("y", y, x.dtype, {x.size[0], weight.size[0], x.size[2], x.size[3]});
}

inline void check_grad_y(const Tensor& grad_y, const Tensor& x, const Tensor& weight) {
  check_inputs(x, weight);
  check_shape("grad_y", grad_y, {x.size[0], weight.size[0], x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
}

// A gradient that the caller may decline by passing a tensor of shape [0].
inline bool is_wanted(const Tensor& t) { return t.ndim != 1 || t.size[0] != 0; }

inline void check_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                           const Tensor& grad_weight) {
  check_grad_y(grad_y, x, weight);
  if (is_wanted(grad_x)) check_dense("grad_x", grad_x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (is_wanted(grad_weight)) {
    check_dense("grad_weight", grad_weight, accumulator_of(x.dtype), {weight.size[0], weight.size[1], weight.size[2]});
  }
}

}  // namespace mirage::dense_conv
