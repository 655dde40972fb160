#pragma once

#include "common/cpu/isa.h"
#include "mirage/tensor.h"

MIRAGE_DECLARE_KERNEL(void channel_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const Tensor& temperature, const Tensor& out,
                                                     const Tensor& matrices))
MIRAGE_DECLARE_KERNEL(void channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& temperature,
                                                      const Tensor& matrices, const Tensor& grad_q,
                                                      const Tensor& grad_k, const Tensor& grad_v,
                                                      const Tensor& grad_temperature))

// The parts that the fused operator shares: the pass that computes the matrices from q and k, and its backward, which
// computes the gradients of q, k and temperature from that of attn, grad_attn [B, heads, d, d].
MIRAGE_DECLARE_KERNEL(void attention_weights(const Tensor& q, const Tensor& k, const Tensor& temperature,
                                             const Tensor& matrices))
MIRAGE_DECLARE_KERNEL(void attention_weights_backward(const double* grad_attn, const Tensor& q, const Tensor& k,
                                                      const Tensor& temperature, const Tensor& matrices,
                                                      const Tensor& grad_q, const Tensor& grad_k,
                                                      const Tensor& grad_temperature))
