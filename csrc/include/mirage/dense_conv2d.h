// Bias-free convolutions between all channels: what stands between the levels of the network.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// y[b,m] = sum over c of x[b,c] convolved with weight[m,c] (cross-correlation), stride 1, zero padding K / 2.
//   x       [B, C, H, W]    any strides, f32 / f64 / f16 / bf16
//   weight  [M, C, K * K]   contiguous, any dtype; K is 1 or 3
//   y       [B, M, H, W]    contiguous, dtype of x
// Products on bf16 are of operands rounded to bf16, with float sums, where the processor has them.
void dense_conv2d(const Tensor& x, const Tensor& weight, const Tensor& y);

//   grad_y       [B, M, H, W]   any strides, dtype of x
//   grad_x       [B, C, H, W]   contiguous, dtype of x; or of shape [0]: not wanted
//   grad_weight  [M, C, K * K]  contiguous, accumulator of x's dtype; sums over all samples and pixels, zero where there
//                               are none; or of shape [0]: not wanted
void dense_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                           const Tensor& grad_weight);

}  // namespace mirage
