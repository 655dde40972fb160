// The argument checks of gated_depthwise_ffn, for every implementation.
#pragma once

#include "mirage/tensor.h"

namespace mirage::gated {

inline void check_inputs(const Tensor& h, const Tensor& weight) {
  check_ndim("h", h, 4);
  if (h.size[1] % 2) fail("h", "an even number of channels", shape_of(h));
  check_shape("weight", weight, {h.size[1], 9});
  check_dtype("weight", weight, h.dtype);
  check_contiguous("weight", weight);
}

inline void check_forward(const Tensor& h, const Tensor& weight, const Tensor& y) {
  check_inputs(h, weight);
  check_shape("y", y, {h.size[0], h.size[1] / 2, h.size[2], h.size[3]});
  check_dtype("y", y, h.dtype);
  check_contiguous("y", y);
}

inline void check_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
                           const Tensor& grad_weight) {
  check_inputs(h, weight);
  check_shape("grad_y", grad_y, {h.size[0], h.size[1] / 2, h.size[2], h.size[3]});
  check_dtype("grad_y", grad_y, h.dtype);
  check_shape("grad_h", grad_h, {h.size[0], h.size[1], h.size[2], h.size[3]});
  check_dtype("grad_h", grad_h, h.dtype);
  check_contiguous("grad_h", grad_h);
  check_shape("grad_weight", grad_weight, {h.size[1], 9});
  check_dtype("grad_weight", grad_weight, h.dtype);
  check_contiguous("grad_weight", grad_weight);
}

}  // namespace mirage::gated
