// A gated half of a block and its gradients: y = x + project_out(s * g), g = gate(d1) * d2 with
// d = depthwise3x3(activation(project_in(norm(x)))), d1 and d2 its halves. In MIRAGE the activation and the gate are GELU;
// Restormer has no activation, and NAFNet no gate either. NAFNet's first half has s = excite(mean(g)), a product with the
// means of g over the plane (squeeze and excitation without activations); elsewhere s is 1. Its second half has no
// depthwise convolution.
//
// Without `excite` forward and backward are a pass each. With it forward's pass leaves g in memory and adds up its means,
// and a second multiplies it by project_out with columns scaled by s, a matrix for each sample; backward has a pass before
// its own, which reduces the same means and project_out's gradient.
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
  OPTIONAL(dwconv, depthwise3x3, 2 * M, 9)              \
  WEIGHT(project_out, pointwise, C, M)                  \
  OPTIONAL(project_in_bias, as_it_is, 2 * M)            \
  OPTIONAL(dwconv_bias, as_it_is, 2 * M)                \
  OPTIONAL(project_out_bias, as_it_is, C)               \
  OPTIONAL(excite, pointwise, M, M)                     \
  OPTIONAL(excite_bias, as_it_is, M)

// The gradients are contiguous, of the accumulator type, of the shapes of the weights.
MIRAGE_DEFINE_WEIGHTS(MIRAGE_FEED_FORWARD_WEIGHTS, FeedForwardWeights, FeedForwardGradients);

// What follows project_in, and what the gate is of d1.
enum class Activation : int { gelu, none };

inline Activation activation_of(const char* argument, const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name != "none") fail(argument, "'gelu' or 'none'", "'" + name + "'");
  return Activation::none;
}

// The defaults are those of MIRAGE.
struct FeedForwardOptions {
  double eps;
  NormKind norm = NormKind::centred;
  Activation activation = Activation::gelu, gate = Activation::gelu;
};

//   x       [B, C, H, W]   any strides, f32 / f64 / f16 / bf16
//   y       [B, C, H, W]   contiguous, dtype of x; may be a contiguous x itself, which is written over (without excite)
//   hidden  [B, 2M, H, W]  contiguous, dtype of x, or null: receives project_in's result before the activation
//   scale   [C]            contiguous, any type, or none: what is added to x is multiplied by it
// The hidden tensor of 2M channels exists a tile at a time, in cache. With `excite` the gated channels lie in y, or in
// scratch memory where there are more or fewer than C.
void feed_forward_stage(const Tensor& x, const FeedForwardWeights& weights, const FeedForwardOptions& options,
                        const Tensor& y, const Tensor* hidden = nullptr, const Tensor& scale = {});

// A stage among several.
struct FeedForward {
  FeedForwardWeights weights;
  FeedForwardOptions options;
  Tensor scale;
};

// `count` stages one after the other, at least one. x: any strides; y: contiguous, dtype of x, not x itself. A stage without
// `excite` is written over the result of the one before. Scratch memory as that of a stage, and a map like y where a stage
// behind the first has `excite`.
void feed_forward_stages(const Tensor& x, const FeedForward* stages, int64_t count, const Tensor& y);

// feed_forward_stage of a part of a map. x: a window into it; y [B, C, rows.length(), columns.length()]: the pixels between the
// outermost cuts (those in between mean nothing here), whole lines of any other strides, memory apart from x.
void feed_forward_stage_region(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                               const FeedForwardWeights& weights, const FeedForwardOptions& options, const Tensor& y);

// Recomputes forward from x tile by tile, or reads `hidden` where it is given. grad_y: any strides, dtype of x; grad_x:
// contiguous, dtype of x. Scratch memory: a few megabytes per thread and at most 16 copies of the weights' gradients.
void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const FeedForwardWeights& weights,
                                 const FeedForwardOptions& options, const Tensor* hidden, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients);

}  // namespace mirage
