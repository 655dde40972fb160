#pragma once

#include "common/cpu/isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean))
MIRAGE_DECLARE_KERNEL(void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean,
                                                   const Tensor& grad_x))
