// The second half of a block in one pass, and its gradients in one: y = x + project_out(gelu(d1) * d2) with
// d = depthwise3x3(activation(project_in(norm(x)))), d1 and d2 its halves. MIRAGE's activation is GELU; Restormer has none.
#pragma once

#include <string>

#include "mirage/norm.h"
#include "mirage/region.h"
#include "mirage/stage_weights.h"
#include "mirage/tensor.h"

namespace mirage {

// C channels, M pairs of hidden channels. All contiguous, of any type.
#define MIRAGE_FEED_FORWARD_WEIGHTS(WEIGHT, OPTIONAL, BUFFER)\
  WEIGHT(norm_weight, as_it_is, C)                      \
  OPTIONAL(norm_bias, as_it_is, C)                      \
  WEIGHT(project_in, pointwise, 2 * M, C)               \
  WEIGHT(dwconv, depthwise3x3, 2 * M, 9)                \
  WEIGHT(project_out, pointwise, C, M)                  \
  OPTIONAL(project_in_bias, as_it_is, 2 * M)            \
  OPTIONAL(dwconv_bias, as_it_is, 2 * M)                \
  OPTIONAL(project_out_bias, as_it_is, C)

// The gradients are contiguous, of the accumulator type, of the shapes of the weights.
MIRAGE_DEFINE_WEIGHTS(MIRAGE_FEED_FORWARD_WEIGHTS, FeedForwardWeights, FeedForwardGradients);

// What follows project_in.
enum class Activation : int { gelu, none };

inline Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name != "none") fail("activation", "'gelu' or 'none'", "'" + name + "'");
  return Activation::none;
}

// The defaults are those of MIRAGE.
struct FeedForwardOptions {
  double eps;
  NormKind norm = NormKind::centred;
  Activation activation = Activation::gelu;
};

//   x       [B, C, H, W]   any strides, f32 / f64 / f16 / bf16
//   y       [B, C, H, W]   contiguous, dtype of x; may be a contiguous x itself, which is written over
//   hidden  [B, 2M, H, W]  contiguous, dtype of x, or null: receives project_in's result before the activation
// The hidden tensor of 2M channels exists a tile at a time, in cache.
void feed_forward_stage(const Tensor& x, const FeedForwardWeights& weights, const FeedForwardOptions& options,
                        const Tensor& y, const Tensor* hidden = nullptr);

// The same of a part of a map. x: a window into it; y [B, C, rows.length(), columns.length()]: the pixels between the
// outermost cuts (those in between mean nothing here), whole lines of any other strides, memory apart from x.
void feed_forward_stage_region(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                               const FeedForwardWeights& weights, const FeedForwardOptions& options, const Tensor& y);

// Recomputes forward from x tile by tile, or reads `hidden` where it is given. grad_y: any strides, dtype of x; grad_x:
// contiguous, dtype of x. Scratch memory: a few megabytes per thread and at most 16 copies of the weights' gradients.
void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const FeedForwardWeights& weights,
                                 const FeedForwardOptions& options, const Tensor* hidden, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients);

}  // namespace mirage
