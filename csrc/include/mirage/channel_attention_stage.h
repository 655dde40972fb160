// The first half of a Restormer block: y = x + project_out(attention(q, k, v)) with (q, k, v) = depthwise3x3(qkv(norm(x)))
// and, per head, attention = softmax(l2norm(q) l2norm(k)^T * temperature) v over channels.
//
// One pass over tiles reduces q k^T and the norms of q and k, neither of which is written, and leaves v in the memory of
// y. The softmax is folded into project_out, a matrix for each sample, and a second pass multiplies v by it.
#pragma once

#include "mirage/norm.h"
#include "mirage/stage_weights.h"
#include "mirage/tensor.h"

namespace mirage {

// C channels. All contiguous, of any type: the kernels convert.
#define MIRAGE_CHANNEL_ATTENTION_WEIGHTS(WEIGHT, OPTIONAL, BUFFER) \
  WEIGHT(norm_weight, as_it_is, C)                                 \
  OPTIONAL(norm_bias, as_it_is, C)                                 \
  WEIGHT(qkv, pointwise, 3 * C, C)                                 \
  OPTIONAL(qkv_bias, as_it_is, 3 * C)                              \
  WEIGHT(qkv_dwconv, depthwise3x3, 3 * C, 9)                       \
  OPTIONAL(qkv_dwconv_bias, as_it_is, 3 * C)                       \
  WEIGHT(temperature, per_head, heads)                             \
  WEIGHT(project_out, pointwise, C, C)                             \
  OPTIONAL(project_out_bias, as_it_is, C)

// The gradients are contiguous, of the accumulator type, of the shapes of the weights.
MIRAGE_DEFINE_WEIGHTS(MIRAGE_CHANNEL_ATTENTION_WEIGHTS, ChannelAttentionWeights, ChannelAttentionGradients);

// x [B, C, H, W] of any strides, f32 / f64 / f16 / bf16; y contiguous, of the dtype of x, memory apart from x. attention
// [B, heads, 2d + 2, d], contiguous, of the accumulator type, d = C / heads: receives what backward needs, the softmax, q k^T,
// |q| and |k|. Scratch memory: about two megabytes per thread, C x C numbers per sample and at most 64 copies of the matrices.
void channel_attention_stage(const Tensor& x, const ChannelAttentionWeights& weights, NormKind norm, double eps,
                             const Tensor& attention, const Tensor& y);

// Recomputes forward from x, tile by tile. grad_y: any strides, dtype of x; grad_x: contiguous, dtype of x. Scratch memory:
// about two megabytes per thread, 3 C feature maps of the accumulator type (gradients that one pass leaves to the next), and
// at most 16 copies of the weights' gradients.
void channel_attention_stage_backward(const Tensor& grad_y, const Tensor& x, const ChannelAttentionWeights& weights,
                                      NormKind norm, double eps, const Tensor& attention, const Tensor& grad_x,
                                      const ChannelAttentionGradients& gradients);

}  // namespace mirage
