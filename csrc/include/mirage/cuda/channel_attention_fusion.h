// channel_attention and tri_branch_fusion as one operator on a GPU, which keeps the attention's output on chip.
// mirage/channel_attention_fusion.h defines it; for the tensors see channel_attention.h and tri_branch_fusion.h.
#pragma once

#include <string>

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Why this problem has no kernel, in a few words; empty if it has one.
std::string channel_attention_fusion_problem(const Tensor& q, int64_t heads);

// Bytes of workspace for forward and backward.
int64_t channel_attention_fusion_workspace(const Tensor& q, int64_t heads);

// Both throw std::invalid_argument as the CPU library does, and std::runtime_error if a launch fails.
void channel_attention_fusion_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                                      const Tensor& conv, const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                                      const Tensor& l_mlp, const Tensor& out, const Tensor& matrices,
                                      const Options& options);

void channel_attention_fusion_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& temperature, const Tensor& conv, const Tensor& mlp,
                                       const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                       const Tensor& matrices, const Tensor& grad_q, const Tensor& grad_k,
                                       const Tensor& grad_v, const Tensor& grad_temperature, const Tensor& grad_conv,
                                       const Tensor& grad_mlp, const Tensor& grad_l_att, const Tensor& grad_l_conv,
                                       const Tensor& grad_l_mlp, const Options& options);

}  // namespace mirage::cuda
