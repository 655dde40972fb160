// Attention over channels on a GPU. mirage/channel_attention.h says what is computed, and what of f32, f16 and bf16 maps on the
// current device, in heads of up to 64 channels; the temperature may also be f64.
#pragma once

#include <string>

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Why this cannot be computed here, in a few words; empty where it can.
std::string channel_attention_problem(const Tensor& q, int64_t heads);

// Bytes of scratch memory, forward and backward: a few d x d matrices for each head and multiprocessor.
int64_t channel_attention_workspace(const Tensor& q, int64_t heads);

// Both throw std::invalid_argument as the CPU library does, std::runtime_error where a launch fails. Float32 products may be
// of TF32 where options.tf32 says so; those of 16-bit maps are exact, with the matrices rounded to TF32.
void channel_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                               const Tensor& out, const Tensor& matrices, const Options& options);

void channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& temperature, const Tensor& matrices, const Tensor& grad_q,
                                const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_temperature,
                                const Options& options);

}  // namespace mirage::cuda
