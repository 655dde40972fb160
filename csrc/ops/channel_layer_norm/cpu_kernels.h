#pragma once

#include "common/cpu/isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void channel_layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                      double eps, const Tensor& y, const Tensor& mean,
                                                      const Tensor& rstd))
MIRAGE_DECLARE_KERNEL(void channel_layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                       const Tensor& mean, const Tensor& rstd, const Tensor& grad_x,
                                                       const Tensor& grad_weight, const Tensor& grad_bias))
