// Argument checks of feed_forward_stage, for every implementation and for callers that run several stages and must not
// stop between them.
#pragma once

#include "mirage/feed_forward_stage.h"
#include "mirage/tensor.h"

namespace mirage {

inline void check_feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                     const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out) {
  check_ndim("x", x, 4);
  check_ndim("project_out", project_out, 2);
  const int64_t channels = x.size[1], pairs = project_out.size[1];
  check_dense("norm_weight", norm_weight, {channels});
  check_dense("norm_bias", norm_bias, {channels});
  check_dense("project_in", project_in, {2 * pairs, channels});
  check_dense("dwconv", dwconv, {2 * pairs, 9});
  check_dense("project_out", project_out, {channels, pairs});
}

// Checks what backward takes besides the inputs of forward.
inline void check_feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& project_out,
                                              const Tensor& grad_x, const FeedForwardGradients& gradients) {
  const int64_t channels = x.size[1], pairs = project_out.size[1];
  const DType acc = accumulator_of(x.dtype);
  check_shape("grad_y", grad_y, {x.size[0], channels, x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
  check_dense("grad_x", grad_x, x.dtype, {x.size[0], channels, x.size[2], x.size[3]});
  check_dense("grad_norm_weight", gradients.norm_weight, acc, {channels});
  check_dense("grad_norm_bias", gradients.norm_bias, acc, {channels});
  check_dense("grad_project_in", gradients.project_in, acc, {2 * pairs, channels});
  check_dense("grad_dwconv", gradients.dwconv, acc, {2 * pairs, 9});
  check_dense("grad_project_out", gradients.project_out, acc, {channels, pairs});
}

}  // namespace mirage
