// The second half of a MIRAGE block in one pass, and its gradients in one: y = x + project_out(gelu(d1) * d2) with
// d = depthwise3x3(gelu(project_in(layer_norm(x)))), d1 and d2 its halves.
#pragma once

#include "mirage/region.h"
#include "mirage/stage_weights.h"
#include "mirage/tensor.h"

namespace mirage {

// C channels, M pairs of hidden channels. All contiguous, of any type.
#define MIRAGE_FEED_FORWARD_WEIGHTS(WEIGHT, OPTIONAL, BUFFER)\
  WEIGHT(norm_weight, as_it_is, C)                      \
  WEIGHT(norm_bias, as_it_is, C)                        \
  WEIGHT(project_in, pointwise, 2 * M, C)               \
  WEIGHT(dwconv, depthwise3x3, 2 * M, 9)                \
  WEIGHT(project_out, pointwise, C, M)

// The gradients are contiguous, of the accumulator type, of the shapes of the weights.
MIRAGE_DEFINE_WEIGHTS(MIRAGE_FEED_FORWARD_WEIGHTS, FeedForwardWeights, FeedForwardGradients);

//   x                       [B, C, H, W]   any strides, f32 / f64 / f16 / bf16
//   norm_weight, norm_bias  [C]            contiguous
//   project_in              [2M, C]        contiguous
//   dwconv                  [2M, 9]        contiguous
//   project_out             [C, M]         contiguous
//   y                       [B, C, H, W]   contiguous, dtype of x; may be a contiguous x itself, which is written over
//   hidden                  [B, 2M, H, W]  contiguous, dtype of x, or null: receives project_in's result before its GELU
// The weights are of any type. The hidden tensor of 2M channels exists a tile at a time, in cache.
void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out, const Tensor& y,
                        const Tensor* hidden = nullptr);

// The same of a part of a map. x: a window into it; y [B, C, rows.length(), columns.length()]: the pixels between the
// outermost cuts (those in between mean nothing here), whole lines of any other strides, memory apart from x.
void feed_forward_stage_region(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                               const FeedForwardWeights& weights, double eps, const Tensor& y);

// Recomputes forward from x tile by tile, or reads `hidden` where it is given. grad_y: any strides, dtype of x; grad_x:
// contiguous, dtype of x. Scratch memory: a few megabytes per thread and at most 16 copies of the weights' gradients.
void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& norm_weight,
                                 const Tensor& norm_bias, double eps, const Tensor& project_in, const Tensor& dwconv,
                                 const Tensor& project_out, const Tensor* hidden, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients);

}  // namespace mirage
