// The fusion of MIRAGE's three branches on a GPU. mirage/tri_branch_fusion.h defines it. Tensors are f32, f16 or bf16
// on the current device; the modulation weights may also be f64.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Both throw std::invalid_argument as the CPU library does, and std::runtime_error if a launch fails.
void tri_branch_fusion_forward(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                               const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out, const Options& options);

// Bytes of workspace for the gradients of the modulation weights.
int64_t tri_branch_fusion_backward_workspace(const Tensor& att);

void tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv, const Tensor& mlp,
                                const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp, const Tensor& grad_att,
                                const Tensor& grad_conv, const Tensor& grad_mlp, const Tensor& grad_l_att,
                                const Tensor& grad_l_conv, const Tensor& grad_l_mlp, const Options& options);

}  // namespace mirage::cuda
