// Covariance of channels over pixels, regularised to be positive definite (the SPD head of MIRAGE).
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// y[b] = (X - mu) (X - mu)^T / (N - 1) + eps I, with X = x[b] as a [C, N] matrix, N = H * W >= 2, mu its row means
//   x     [B, C, H, W]  any strides, f32 / f64 / f16 / bf16
//   y     [B, C, C]     contiguous, dtype of x; exactly symmetric
//   mean  [B, 2, C]     contiguous, accumulator type of x: mu rounded, and what the rounding left over
void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean);

// grad_x[b] = (G + G^T) (X - mu) / (N - 1) with G = grad_y[b]. Centring needs no term of its own: the rows of X - mu
// sum to zero, so the gradient's do.
//   grad_y  [B, C, C]     any strides, dtype of x
//   mean    [B, 2, C]     as the forward pass gave it
//   grad_x  [B, C, H, W]  contiguous, dtype of x
void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x);

}  // namespace mirage
