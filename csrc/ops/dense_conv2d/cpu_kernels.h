#pragma once

#include "common/cpu/isa.h"
#include "mirage/dense_conv2d.h"

MIRAGE_DECLARE_KERNEL(void dense_conv2d(const Tensor& x, const Tensor& weight, const Tensor& y))
MIRAGE_DECLARE_KERNEL(void dense_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                 const Tensor& grad_x, const Tensor& grad_weight))
