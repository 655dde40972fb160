// Argument checks of channel_attention_stage.
#pragma once

#include <vector>

#include "common/weight_checks.h"
#include "mirage/channel_attention_stage.h"

namespace mirage {

inline void check_channel_attention_stage(const Tensor& x, const ChannelAttentionWeights& w, const Tensor& attention) {
  check_ndim("x", x, 4);
  check_ndim("temperature", w.temperature, 1);
  const int64_t C = x.size[1], heads = w.temperature.size[0];
  if (heads == 0 || C % heads) fail("temperature", "a divisor of " + std::to_string(C), shape_of(w.temperature));
  MIRAGE_CHANNEL_ATTENTION_WEIGHTS(MIRAGE_CHECK_WEIGHT, MIRAGE_CHECK_OPTIONAL, MIRAGE_CHECK_WEIGHT)
  check_dense("attention", attention, accumulator_of(x.dtype), {x.size[0], heads, 2 * (C / heads) + 2, C / heads});
}

inline std::vector<GradientOf> channel_attention_gradients(const ChannelAttentionWeights& weights,
                                                           const ChannelAttentionGradients& gradients) {
  return of_given({MIRAGE_CHANNEL_ATTENTION_WEIGHTS(MIRAGE_GRADIENT_OF, MIRAGE_GRADIENT_OF, MIRAGE_NO_WEIGHT)});
}

// Checks what backward takes besides the inputs of forward.
inline void check_channel_attention_stage_backward(const Tensor& grad_y, const Tensor& x,
                                                   const ChannelAttentionWeights& weights, const Tensor& grad_x,
                                                   const ChannelAttentionGradients& gradients) {
  check_shape("grad_y", grad_y, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
  check_dense("grad_x", grad_x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_gradients(accumulator_of(x.dtype), channel_attention_gradients(weights, gradients));
}

}  // namespace mirage
