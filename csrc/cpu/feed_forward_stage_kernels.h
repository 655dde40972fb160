#pragma once

#include "isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                              double eps, const Tensor& project_in, const Tensor& dwconv,
                                              const Tensor& project_out, const Tensor& y))
