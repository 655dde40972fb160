// channel_attention and tri_branch_fusion in one: the attention's output never reaches memory by itself.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// Arguments as in channel_attention.h and tri_branch_fusion.h; out is [B, 3C, H, W], of the dtype of q, or f32 for
// 16-bit inputs; conv and mlp have the dtype of q.
void channel_attention_fusion_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                                      const Tensor& conv, const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                                      const Tensor& l_mlp, const Tensor& out, const Tensor& matrices);

void channel_attention_fusion_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& temperature, const Tensor& conv, const Tensor& mlp,
                                       const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                       const Tensor& matrices, const Tensor& grad_q, const Tensor& grad_k,
                                       const Tensor& grad_v, const Tensor& grad_temperature, const Tensor& grad_conv,
                                       const Tensor& grad_mlp, const Tensor& grad_l_att, const Tensor& grad_l_conv,
                                       const Tensor& grad_l_mlp);

}  // namespace mirage
