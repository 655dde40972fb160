// Attention over channels on a GPU. mirage/channel_attention.h defines it. Tensors are f32, f16 or bf16 on the current
// device, with up to 64 channels per head; the temperature may also be f64.
#pragma once

#include <string>

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Why this problem has no kernel, in a few words; empty if it has one.
std::string channel_attention_problem(const Tensor& q, int64_t heads);

// Bytes of workspace for forward and backward: a few d x d matrices for each head and SM.
int64_t channel_attention_workspace(const Tensor& q, int64_t heads);

// Both throw std::invalid_argument as the CPU library does, and std::runtime_error if a launch fails. Matrix products
// of f32 use TF32 if options.tf32 is set. Those of 16-bit tensors are exact, with the attention matrices rounded to
// TF32.
void channel_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                               const Tensor& out, const Tensor& matrices, const Options& options);

void channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& temperature, const Tensor& matrices, const Tensor& grad_q,
                                const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_temperature,
                                const Options& options);

}  // namespace mirage::cuda
