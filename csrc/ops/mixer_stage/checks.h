// Argument checks of mixer_stage, for every implementation and for callers that run several stages and must not stop
// between them.
#pragma once

#include <vector>

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

inline void check_mixer_stage(const Tensor& x, const MixerWeights& w, const Tensor& branch_scale,
                              const MixerStatistics& s) {
  check_ndim("x", x, 4);
  check_ndim("gic2", w.gic2, 2);
  const DType acc = accumulator_of(x.dtype);
  const int64_t C = x.size[1], c = C / 3, h = w.gic2.size[1];
  if (C == 0 || C % 3) fail("x", "a multiple of 3 channels", shape_of(x));
  const int64_t heads = heads_of(x, w);
  if (h < c) fail("gic2", "at least " + std::to_string(c) + " columns", shape_of(w.gic2));
  check_dense("norm_weight", w.norm_weight, {C});
  check_dense("norm_bias", w.norm_bias, {C});
  check_dense("qkv", w.qkv, {3 * c, c});
  check_dense("qkv_dwconv", w.qkv_dwconv, {3 * c, 9});
  check_dense("temperature", w.temperature, {heads});
  check_dense("bn_weight", w.bn_weight, {c});
  check_dense("bn_bias", w.bn_bias, {c});
  check_dense("bn_mean", w.bn_mean, {c});
  check_dense("bn_var", w.bn_var, {c});
  check_dense("gic1", w.gic1, {2 * h, c});
  check_dense("generator_in", w.generator_in, {c, c});
  check_dense("generator_out", w.generator_out, {kMixerKernelSize * kMixerKernelSize * c, c});
  check_dense("gate_temperature", w.gate_temperature, {1});
  check_dense("gic2", w.gic2, {c, h});
  check_dense("proj_out", w.proj_out, {c, c});
  check_dense("mlp_in", w.mlp_in, {2 * c, c});
  check_dense("mlp_out", w.mlp_out, {c, 2 * c});
  check_dense("alpha_att", w.alpha_att, {1});
  check_dense("alpha_conv", w.alpha_conv, {1});
  check_dense("alpha_mlp", w.alpha_mlp, {1});
  check_dense("project_out", w.project_out, {C, C});
  check_dense("branch_scale", branch_scale, acc, {x.size[0]});
  check_dense("attention", s.attention, acc, {x.size[0], heads, 2 * (c / heads) + 2, c / heads});
  check_dense("kernels", s.kernels, acc, {x.size[0], c, kMixerKernelSize * kMixerKernelSize});
  check_dense("branch_mean", s.branch_mean, acc, {x.size[0], c});
  check_dense("batch_mean", s.batch_mean, acc, {c});
  check_dense("batch_var", s.batch_var, acc, {c});
}

// A gradient of a weight, and the weight.
struct MixerGradientOf {
  const char* name;
  const Tensor &gradient, &weight;
};

inline std::vector<MixerGradientOf> mixer_gradients(const MixerWeights& weights, const MixerGradients& gradients) {
  return {{"grad_norm_weight", gradients.norm_weight, weights.norm_weight},
          {"grad_norm_bias", gradients.norm_bias, weights.norm_bias},
          {"grad_qkv", gradients.qkv, weights.qkv},
          {"grad_qkv_dwconv", gradients.qkv_dwconv, weights.qkv_dwconv},
          {"grad_temperature", gradients.temperature, weights.temperature},
          {"grad_bn_weight", gradients.bn_weight, weights.bn_weight},
          {"grad_bn_bias", gradients.bn_bias, weights.bn_bias},
          {"grad_gic1", gradients.gic1, weights.gic1},
          {"grad_generator_in", gradients.generator_in, weights.generator_in},
          {"grad_generator_out", gradients.generator_out, weights.generator_out},
          {"grad_gate_temperature", gradients.gate_temperature, weights.gate_temperature},
          {"grad_gic2", gradients.gic2, weights.gic2},
          {"grad_proj_out", gradients.proj_out, weights.proj_out},
          {"grad_mlp_in", gradients.mlp_in, weights.mlp_in},
          {"grad_mlp_out", gradients.mlp_out, weights.mlp_out},
          {"grad_alpha_att", gradients.alpha_att, weights.alpha_att},
          {"grad_alpha_conv", gradients.alpha_conv, weights.alpha_conv},
          {"grad_alpha_mlp", gradients.alpha_mlp, weights.alpha_mlp},
          {"grad_project_out", gradients.project_out, weights.project_out}};
}

// Checks what backward takes besides the inputs of forward.
inline void check_mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights,
                                       const Tensor& grad_x, const MixerGradients& gradients) {
  check_shape("grad_y", grad_y, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
  check_dense("grad_x", grad_x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  const DType acc = accumulator_of(x.dtype);
  for (const auto& [name, gradient, weight] : mixer_gradients(weights, gradients)) {
    const int64_t rows = weight.size[0];
    if (weight.ndim == 1) check_dense(name, gradient, acc, {rows});
    else check_dense(name, gradient, acc, {rows, weight.size[1]});
  }
}

}  // namespace mirage
