#pragma once

#include "common/cpu/isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void tri_branch_fusion_forward(const Tensor& att, const Tensor& conv, const Tensor& mlp,
                                                     const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                                     const Tensor& out))
MIRAGE_DECLARE_KERNEL(void tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv,
                                                      const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                                                      const Tensor& l_mlp, const Tensor& grad_att,
                                                      const Tensor& grad_conv, const Tensor& grad_mlp,
                                                      const Tensor& grad_l_att, const Tensor& grad_l_conv,
                                                      const Tensor& grad_l_mlp))
