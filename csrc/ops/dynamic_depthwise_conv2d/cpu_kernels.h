#pragma once

#include "common/cpu/isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void dynamic_depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const Tensor& y))
MIRAGE_DECLARE_KERNEL(void dynamic_depthwise_conv2d_backward(const Tensor& grad_y, const Tensor& x,
                                                             const Tensor& weight, const Tensor& grad_x,
                                                             const Tensor& grad_weight))
