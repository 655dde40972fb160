// The mixer half of a MIRAGE block in two passes: y = x + mixer(LayerNorm(x)), with channel attention, the gated CNN
// with its generated 7x7 kernels, the per-pixel MLP, their fusion and the last 1x1 convolution.
//
// The first pass reduces (q k^T, |q|, |k|, the branch's mean and variance), the second recomputes what it needs and
// writes y. Nothing of the size of a feature map is stored in between.
#pragma once

#include "mirage/region.h"
#include "mirage/stage_weights.h"
#include "mirage/tensor.h"

namespace mirage {

constexpr int kMixerKernelSize = 7;
constexpr int kMixerKernelTaps = kMixerKernelSize * kMixerKernelSize;

// C channels, c = C / 3, h hidden channels of the gated CNN. All contiguous, of any type: the kernels convert. bn_mean and
// bn_var are running statistics; rows of gic1 are gate (h), identity (h - c) and detail (c).
#define MIRAGE_MIXER_WEIGHTS(WEIGHT, OPTIONAL, BUFFER)          \
  WEIGHT(norm_weight, as_it_is, C)                              \
  WEIGHT(norm_bias, as_it_is, C)                                \
  WEIGHT(qkv, pointwise, 3 * c, c)                              \
  WEIGHT(qkv_dwconv, depthwise3x3, 3 * c, 9)                    \
  WEIGHT(temperature, per_head, heads)                          \
  WEIGHT(bn_weight, as_it_is, c)                                \
  WEIGHT(bn_bias, as_it_is, c)                                  \
  BUFFER(bn_mean, as_it_is, c)                                  \
  BUFFER(bn_var, as_it_is, c)                                   \
  WEIGHT(gic1, pointwise, 2 * h, c)                             \
  WEIGHT(generator_in, pointwise, c, c)                         \
  WEIGHT(generator_out, pointwise, kMixerKernelTaps * c, c)     \
  WEIGHT(gate_temperature, as_it_is, 1)                         \
  WEIGHT(gic2, pointwise, c, h)                                 \
  WEIGHT(proj_out, pointwise, c, c)                             \
  WEIGHT(mlp_in, pointwise_1d, 2 * c, c)                        \
  WEIGHT(mlp_out, pointwise_1d, c, 2 * c)                       \
  WEIGHT(alpha_att, as_it_is, 1)                                \
  WEIGHT(alpha_conv, as_it_is, 1)                               \
  WEIGHT(alpha_mlp, as_it_is, 1)                                \
  WEIGHT(project_out, pointwise, C, C)

// The gradients are of the accumulator type, of the shapes of the weights.
MIRAGE_DEFINE_WEIGHTS(MIRAGE_MIXER_WEIGHTS, MixerWeights, MixerGradients);

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

// ---- the passes by themselves, on parts of a map; in eval mode, without stochastic depth --------------------------------

// What the matrices follow from, summed over the pixels of each cell of a grid: q k^T of each head (c * d numbers), |q|^2
// and |k|^2 (c each), and the gated CNN's input (c). Sums of cells add up. d = c / heads.
inline int64_t mixer_sums(int64_t c, int64_t heads) { return c * (c / heads) + 3 * c; }

// x [B, C, h, w]: a window with a halo of one pixel around the cells; sums [B, rows.count, columns.count, mixer_sums], double,
// contiguous.
void mixer_stage_sums(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                      const MixerWeights& weights, const MixerOptions& options, const Tensor& sums);

// From sums [N, mixer_sums] over pixels [N], both double and contiguous, what MixerStatistics has of a sample: attention
// [N, heads, 2d + 2, d] and kernels [N, c, 49], both float or both double, contiguous.
void mixer_stage_statistics(const Tensor& sums, const Tensor& pixels, const MixerWeights& weights,
                            const MixerOptions& options, const Tensor& attention, const Tensor& kernels);

// x [B, C, h, w]: a window with a halo of three pixels around the cells; attention and kernels as above, of [B, rows.count,
// columns.count] cells, in the accumulator's type. y [B, C, rows.length(), columns.length()]: the pixels of the cells, whole
// lines of any other strides, memory apart from x.
void mixer_stage_apply(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                       const MixerWeights& weights, const MixerOptions& options, const Tensor& attention,
                       const Tensor& kernels, const Tensor& y);

// Recomputes forward from x, tile by tile. Scratch memory: about two megabytes per thread, 2 C feature maps of the
// accumulator type (gradients that one pass leaves to the next), and at most 16 copies of the weights' gradients.
void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& options, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients);

}  // namespace mirage
