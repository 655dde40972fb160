// Depthwise convolution with one kernel per sample and channel (the generated kernels of MIRAGE's gated CNN branch).
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// y[b,c,i,j] = sum over p,q of weight[b,c,p,q] * x[b,c,i + p - K/2,j + q - K/2], x being zero outside its plane
//   x       [B, C, H, W]  any strides, f32 / f64 / f16 / bf16
//   weight  [B, C, K, K]  any strides, dtype of x; K is 3, 5, 7, 9 or 11
//   y       [B, C, H, W]  contiguous, dtype of x
void dynamic_depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const Tensor& y);

//   grad_y       [B, C, H, W]  any strides, dtype of x
//   grad_x       [B, C, H, W]  contiguous, dtype of x; or of shape [0]: not wanted
//   grad_weight  [B, C, K, K]  contiguous, dtype of x; or of shape [0]: not wanted
void dynamic_depthwise_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& grad_x, const Tensor& grad_weight);

}  // namespace mirage
