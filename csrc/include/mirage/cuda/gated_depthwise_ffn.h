// The gate of the feed-forward network on a GPU. mirage/gated_depthwise_ffn.h defines it. Tensors are f32, f16 or bf16
// on the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Both throw std::invalid_argument as the CPU library does, and std::runtime_error if a launch fails.
void gated_depthwise_ffn_forward(const Tensor& h, const Tensor& weight, const Tensor& y, const Options& options);

// Bytes of workspace for the weight gradient.
int64_t gated_depthwise_ffn_backward_workspace(const Tensor& h, const Tensor& weight);

void gated_depthwise_ffn_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
                                  const Tensor& grad_weight, const Options& options);

}  // namespace mirage::cuda
