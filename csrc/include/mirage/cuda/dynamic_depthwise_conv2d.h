// Depthwise convolution with one kernel per sample and channel, on a GPU. mirage/dynamic_depthwise_conv2d.h defines it.
// Tensors are f32, f16 or bf16 on the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Both throw std::invalid_argument as the CPU library does, and std::runtime_error if a launch fails.
void dynamic_depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const Tensor& y, const Options& options);

// Bytes of workspace for the weight gradient.
int64_t dynamic_depthwise_conv2d_backward_workspace(const Tensor& x, const Tensor& weight);

void dynamic_depthwise_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& grad_x, const Tensor& grad_weight, const Options& options);

}  // namespace mirage::cuda
