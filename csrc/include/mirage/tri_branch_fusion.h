// The fusion of MIRAGE's three branches: each one modulated by the other two, then concatenated.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

//   out[:, 0:C]   = att  + l_att  * sigmoid(conv + mlp)
//   out[:, C:2C]  = conv + l_conv * sigmoid(att + mlp)
//   out[:, 2C:3C] = mlp  + l_mlp  * sigmoid(att + conv)
//   att, conv, mlp        [B, C, H, W]   any strides, one dtype: f32 / f64 / f16 / bf16
//   l_att, l_conv, l_mlp  [1]            f32 / f64 / f16 / bf16
//   out                   [B, 3C, H, W]  contiguous, dtype of the branches, or f32 for 16-bit branches
void tri_branch_fusion_forward(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                               const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out);

//   grad_out                      [B, 3C, H, W]  any strides, dtype of out
//   grad_att, grad_conv, grad_mlp [B, C, H, W]   contiguous, dtype of the branches
//   grad_l_att, grad_l_conv, grad_l_mlp [1]      dtypes of l_att, l_conv, l_mlp
void tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv, const Tensor& mlp,
                                const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                const Tensor& grad_att, const Tensor& grad_conv, const Tensor& grad_mlp,
                                const Tensor& grad_l_att, const Tensor& grad_l_conv, const Tensor& grad_l_mlp);

}  // namespace mirage
