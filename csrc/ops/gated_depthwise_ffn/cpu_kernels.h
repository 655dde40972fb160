#pragma once

#include "common/cpu/isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void gated_depthwise_ffn_forward(const Tensor& h, const Tensor& weight, const Tensor& y))
MIRAGE_DECLARE_KERNEL(void gated_depthwise_ffn_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight,
                                                        const Tensor& grad_h, const Tensor& grad_weight))
