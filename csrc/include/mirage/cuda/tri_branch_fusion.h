// The fusion of MIRAGE's three branches on a GPU. mirage/tri_branch_fusion.h says what is computed, and what of f32, f16 and
// bf16 maps on the current device; the weights of the modulations may also be f64.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Both throw std::invalid_argument as the CPU library does, std::runtime_error where a launch fails.
void tri_branch_fusion_forward(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                               const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out, const Options& options);

// Bytes of scratch memory for the gradients of the weights.
int64_t tri_branch_fusion_backward_workspace(const Tensor& att);

void tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv, const Tensor& mlp,
                                const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp, const Tensor& grad_att,
                                const Tensor& grad_conv, const Tensor& grad_mlp, const Tensor& grad_l_att,
                                const Tensor& grad_l_conv, const Tensor& grad_l_mlp, const Options& options);

}  // namespace mirage::cuda
