// The mixer half of a MIRAGE block in two passes: y = x + mixer(LayerNorm(x)), with channel attention, the gated CNN
// with its generated 7x7 kernels, the per-pixel MLP, their fusion and the last 1x1 convolution.
//
// The first pass reduces (q k^T, |q|, |k|, the branch's mean and variance), the second recomputes what it needs and
// writes y. Nothing of the size of a feature map is stored in between.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

constexpr int kMixerWeights = 21;
constexpr int kMixerKernelSize = 7;

// C channels, c = C / 3, h hidden channels of the gated CNN. All contiguous, of any type: the kernels convert.
struct MixerWeights {
  Tensor norm_weight, norm_bias;            // [C]
  Tensor qkv, qkv_dwconv;                   // [3c, c], [3c, 9]
  Tensor temperature;                       // [heads]
  Tensor bn_weight, bn_bias;                // [c]
  Tensor bn_mean, bn_var;                   // [c] running statistics
  Tensor gic1;                              // [2h, c]: gate, identity, detail
  Tensor generator_in, generator_out;       // [c, c], [49c, c]
  Tensor gate_temperature;                  // [1]
  Tensor gic2, proj_out;                    // [c, h], [c, c]
  Tensor mlp_in, mlp_out;                   // [2c, c], [c, 2c]
  Tensor alpha_att, alpha_conv, alpha_mlp;  // [1]
  Tensor project_out;                       // [C, C]
};

// The gradients of the weights, in the same order and shapes, of the accumulator type; BatchNorm's running statistics have none.
struct MixerGradients {
  Tensor norm_weight, norm_bias, qkv, qkv_dwconv, temperature, bn_weight, bn_bias, gic1, generator_in, generator_out,
      gate_temperature, gic2, proj_out, mlp_in, mlp_out, alpha_att, alpha_conv, alpha_mlp, project_out;
};

// What backward needs besides x, of the accumulator type, contiguous.
struct MixerStatistics {
  Tensor attention;              // [B, heads, 2d + 2, d]: softmax, q k^T, |q|, |k|
  Tensor kernels;                // [B, c, 49]
  Tensor branch_mean;            // [B, c]: of the gated CNN's input
  Tensor batch_mean, batch_var;  // [c]: what BatchNorm used
};

struct MixerOptions {
  bool training;  // BatchNorm uses the statistics of the batch
  double norm_eps, bn_eps;
};

// x [B, C, H, W] of any strides; branch_scale [B] multiplies the gated CNN's branch before its residual; y contiguous,
// of the dtype of x. Scratch memory: about two megabytes per thread, and a few sums per
// tile.
void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& options,
                 const MixerStatistics& statistics, const Tensor& y);

// Recomputes forward from x, tile by tile. Scratch memory: about two megabytes per thread, 2 C feature maps of the
// accumulator type (gradients that one pass leaves to the next), and at most 16 copies of the weights' gradients.
void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& options, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients);

}  // namespace mirage
