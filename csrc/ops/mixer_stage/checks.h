// Argument checks of mixer_stage, for every implementation and for callers that run several stages and must not stop
// between them.
#pragma once

#include <vector>

#include "common/weight_checks.h"
#include "mirage/mixer_stage.h"
#include "mirage/tensor.h"

namespace mirage {

// The number of heads of the attention, checked to divide the channels of a branch.
inline int64_t heads_of(const Tensor& x, const MixerWeights& w) {
  check_ndim("temperature", w.temperature, 1);
  const int64_t c = x.size[1] / 3, heads = w.temperature.size[0];
  if (heads == 0 || c % heads) fail("temperature", "a divisor of " + std::to_string(c), shape_of(w.temperature));
  return heads;
}

inline void check_mixer_weights(const Tensor& x, const MixerWeights& w) {
  check_ndim("x", x, 4);
  check_ndim("gic2", w.gic2, 2);
  const int64_t C = x.size[1], c = C / 3, h = w.gic2.size[1];
  if (C == 0 || C % 3) fail("x", "a multiple of 3 channels", shape_of(x));
  const int64_t heads = heads_of(x, w);
  if (h < c) fail("gic2", "at least " + std::to_string(c) + " columns", shape_of(w.gic2));
  MIRAGE_MIXER_WEIGHTS(MIRAGE_CHECK_WEIGHT, MIRAGE_CHECK_OPTIONAL, MIRAGE_CHECK_WEIGHT)
}

inline void check_mixer_stage(const Tensor& x, const MixerWeights& w, const Tensor& branch_scale,
                              const MixerStatistics& s) {
  check_mixer_weights(x, w);
  const DType acc = accumulator_of(x.dtype);
  const int64_t c = x.size[1] / 3, heads = w.temperature.size[0];
  check_dense("branch_scale", branch_scale, acc, {x.size[0]});
  check_dense("attention", s.attention, acc, {x.size[0], heads, 2 * (c / heads) + 2, c / heads});
  check_dense("kernels", s.kernels, acc, {x.size[0], c, kMixerKernelTaps});
  check_dense("branch_mean", s.branch_mean, acc, {x.size[0], c});
  check_dense("batch_mean", s.batch_mean, acc, {c});
  check_dense("batch_var", s.batch_var, acc, {c});
}

inline std::vector<GradientOf> mixer_gradients(const MixerWeights& weights, const MixerGradients& gradients) {
  return of_given({MIRAGE_MIXER_WEIGHTS(MIRAGE_GRADIENT_OF, MIRAGE_GRADIENT_OF, MIRAGE_NO_WEIGHT)});
}

// Checks what backward takes besides the inputs of forward.
inline void check_mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights,
                                       const Tensor& grad_x, const MixerGradients& gradients) {
  check_shape("grad_y", grad_y, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
  check_dense("grad_x", grad_x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_gradients(accumulator_of(x.dtype), mixer_gradients(weights, gradients));
}

}  // namespace mirage
