// The gate of MIRAGE's and Restormer's feed-forward network: GELU, depthwise 3x3 convolution, gelu(first) * second.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// a = gelu(h); d[b,c] = a[b,c] convolved with weight[c] (cross-correlation, zero padding 1);
// y[b,c] = gelu(d[b,c]) * d[b,c+M] for c < M. GELU is the exact (erf) one.
//   h       [B, 2M, H, W]  any strides, f32 / f64 / f16 / bf16
//   weight  [2M, 9]        contiguous, dtype of h
//   y       [B, M, H, W]   contiguous, dtype of h
void gated_depthwise_ffn_forward(const Tensor& h, const Tensor& weight, const Tensor& y);

// Recomputes a and d from h.
//   grad_y       [B, M, H, W]   any strides, dtype of h
//   grad_h       [B, 2M, H, W]  contiguous, dtype of h
//   grad_weight  [2M, 9]        contiguous, dtype of h; sums over all samples and pixels, zero where there are none
void gated_depthwise_ffn_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
                                  const Tensor& grad_weight);

}  // namespace mirage
