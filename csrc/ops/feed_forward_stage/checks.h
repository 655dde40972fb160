// Argument checks of feed_forward_stage, for every implementation and for callers that run several stages and must not
// stop between them.
#pragma once

#include <vector>

#include "common/weight_checks.h"
#include "mirage/feed_forward_stage.h"
#include "mirage/tensor.h"

namespace mirage {

inline void check_feed_forward_stage(const Tensor& x, const FeedForwardWeights& w) {
  check_ndim("x", x, 4);
  check_ndim("project_out", w.project_out, 2);
  const int64_t C = x.size[1], M = w.project_out.size[1];
  MIRAGE_FEED_FORWARD_WEIGHTS(MIRAGE_CHECK_WEIGHT, MIRAGE_CHECK_OPTIONAL, MIRAGE_CHECK_WEIGHT)
  if (exists(w.dwconv_bias) && !exists(w.dwconv)) fail("dwconv", "a tensor beside its bias", "none");
  if (exists(w.excite_bias) && !exists(w.excite)) fail("excite", "a tensor beside its bias", "none");
}

// MIRAGE's, which has no biases but the norm's: for what has kernels for nothing else.
inline void check_feed_forward_stage_of_mirage(const Tensor& x, const FeedForwardWeights& w) {
  if (!exists(w.norm_bias)) fail("norm_bias", "a tensor", "none");
  if (exists(w.project_in_bias)) fail("project_in_bias", "none", "a tensor");
  if (exists(w.dwconv_bias)) fail("dwconv_bias", "none", "a tensor");
  if (exists(w.project_out_bias)) fail("project_out_bias", "none", "a tensor");
  if (!exists(w.dwconv)) fail("dwconv", "a tensor", "none");
  if (exists(w.excite)) fail("excite", "none", "a tensor");
  check_feed_forward_stage(x, w);
}

inline void check_feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                     const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out) {
  check_feed_forward_stage_of_mirage(x, {norm_weight, norm_bias, project_in, dwconv, project_out, {}, {}, {}, {}, {}});
}

inline std::vector<GradientOf> feed_forward_gradients(const FeedForwardWeights& weights,
                                                      const FeedForwardGradients& gradients) {
  return of_given({MIRAGE_FEED_FORWARD_WEIGHTS(MIRAGE_GRADIENT_OF, MIRAGE_GRADIENT_OF, MIRAGE_NO_WEIGHT)});
}

// Checks what backward takes besides the inputs of forward.
inline void check_feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const FeedForwardWeights& weights,
                                              const Tensor& grad_x, const FeedForwardGradients& gradients) {
  check_shape("grad_y", grad_y, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
  check_dense("grad_x", grad_x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_gradients(accumulator_of(x.dtype), feed_forward_gradients(weights, gradients));
}

}  // namespace mirage
