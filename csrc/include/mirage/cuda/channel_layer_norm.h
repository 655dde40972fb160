// Layer norm over the channels of each pixel, on a GPU. mirage/channel_layer_norm.h defines it. Tensors are f32, f16 or
// bf16 on the current device; sums are float.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Both throw std::invalid_argument as the CPU library does, and std::runtime_error if a launch fails.
void channel_layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y,
                                const Tensor& mean, const Tensor& rstd, const Options& options);

// Bytes of workspace for the backward pass.
int64_t channel_layer_norm_backward_workspace(const Tensor& x);

void channel_layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                 const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight,
                                 const Tensor& grad_bias, const Options& options);

}  // namespace mirage::cuda
