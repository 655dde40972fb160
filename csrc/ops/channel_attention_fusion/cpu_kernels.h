#pragma once

#include "common/cpu/isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void channel_attention_fusion_forward(const Tensor& v, const Tensor& matrices, const Tensor& conv,
                                                            const Tensor& mlp, const Tensor& l_att,
                                                            const Tensor& l_conv, const Tensor& l_mlp,
                                                            const Tensor& out))
// grad_attn [B, heads, d, d] receives the gradient of attn.
MIRAGE_DECLARE_KERNEL(void channel_attention_fusion_backward(const Tensor& grad_out, const Tensor& v,
                                                             const Tensor& matrices, const Tensor& conv,
                                                             const Tensor& mlp, const Tensor& l_att,
                                                             const Tensor& l_conv, const Tensor& l_mlp,
                                                             const Tensor& grad_v, const Tensor& grad_conv,
                                                             const Tensor& grad_mlp, const Tensor& grad_l_att,
                                                             const Tensor& grad_l_conv, const Tensor& grad_l_mlp,
                                                             double* grad_attn))
