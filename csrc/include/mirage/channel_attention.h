// Transposed ("channel") attention of Restormer and MIRAGE: softmax over channels of normalised inner products.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

// Per sample and head of d = C / heads channels, over the N = H * W pixels of a channel:
//   qn = q / max(|q|, 1e-12), kn likewise; attn = softmax(temperature * qn kn^T); out = attn v
//   q, k, v      [B, C, H, W]         any strides, one dtype: f32 / f64 / f16 / bf16
//   temperature  [heads]              f32 / f64 / f16 / bf16
//   out          [B, C, H, W]         contiguous, dtype of v
//   matrices     [B, heads, 2d+2, d]  contiguous, the accumulator type of q; per (sample, head) d rows of attn, d rows
//                                     of q k^T, |q|, |k|: what backward needs
void channel_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                               const Tensor& out, const Tensor& matrices);

//   grad_out                [B, C, H, W]  any strides, dtype of v
//   grad_q, grad_k, grad_v  [B, C, H, W]  contiguous, dtype of q
//   grad_temperature        [heads]       contiguous, dtype of temperature
void channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& temperature, const Tensor& matrices, const Tensor& grad_q,
                                const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_temperature);

}  // namespace mirage
