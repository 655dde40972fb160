// LayerNorm over the channels at each pixel (design: WithBias LayerNorm of Restormer and MIRAGE, biased variance).
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// y[b,c,p] = (x[b,c,p] - mean[b,p]) * rstd[b,p] * weight[c] + bias[c]
//   x            [B, C, H, W]  any strides, f32 / f64 / f16 / bf16
//   weight, bias [C]           contiguous, f32 / f64 / f16 / bf16
//   y            [B, C, H, W]  contiguous, dtype of x or of weight, whichever the caller promotes to
//   mean, rstd   [B, H, W]     contiguous, the accumulator type of y
void channel_layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                const Tensor& y, const Tensor& mean, const Tensor& rstd);

//   grad_y       [B, C, H, W]  any strides, dtype of y
//   grad_x       [B, C, H, W]  contiguous, dtype of x
//   grad_weight, grad_bias [C] contiguous, dtype of weight
void channel_layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                 const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight,
                                 const Tensor& grad_bias);

}  // namespace mirage
