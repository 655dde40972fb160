#pragma once

#include "common/cpu/isa.h"
#include "mirage/channel_attention_stage.h"

MIRAGE_DECLARE_KERNEL(void channel_attention_stage(const Tensor& x, const ChannelAttentionWeights& weights, NormKind norm,
                                                   double eps, const Tensor& attention, const Tensor& y))
MIRAGE_DECLARE_KERNEL(void channel_attention_stage_backward(const Tensor& grad_y, const Tensor& x,
                                                            const ChannelAttentionWeights& weights, NormKind norm,
                                                            double eps, const Tensor& attention, const Tensor& grad_x,
                                                            const ChannelAttentionGradients& gradients))
