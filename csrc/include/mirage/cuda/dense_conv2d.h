// Bias-free convolutions between all channels, on a GPU. mirage/dense_conv2d.h says what is computed; tensors are of f32,
// f16 or bf16 and live on the current device.
//
// weight: contiguous, of the dtype of x or f32. Products on 16 bits are of operands rounded to the dtype of x, those on
// f32 of floats, or of TF32 where the options allow it; sums are in float. The same bits in every run.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Bytes of scratch memory that dense_conv2d needs.
int64_t dense_conv2d_workspace(const Tensor& x, const Tensor& weight, const Options& options);

// Both throw std::invalid_argument as the CPU library does, std::runtime_error where a launch fails.
void dense_conv2d(const Tensor& x, const Tensor& weight, const Tensor& y, const Options& options);

// Enough for both gradients.
int64_t dense_conv2d_backward_workspace(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                        const Options& options);

void dense_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                           const Tensor& grad_weight, const Options& options);

}  // namespace mirage::cuda
