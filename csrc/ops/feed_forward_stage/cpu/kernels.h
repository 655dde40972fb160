#pragma once

#include "common/cpu/isa.h"
#include "mirage/feed_forward_stage.h"

MIRAGE_DECLARE_KERNEL(void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                              double eps, const Tensor& project_in, const Tensor& dwconv,
                                              const Tensor& project_out, const Tensor& y, const Tensor* hidden))
MIRAGE_DECLARE_KERNEL(void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& norm_weight,
                                                       const Tensor& norm_bias, double eps, const Tensor& project_in,
                                                       const Tensor& dwconv, const Tensor& project_out,
                                                       const Tensor* hidden, const Tensor& grad_x,
                                                       const FeedForwardGradients& gradients))
