// Covariance of channels over pixels, regularised to be positive definite, on a GPU. mirage/spd_covariance.h says what
// is computed, and what of f32, f16 and bf16 tensors on the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Products are of float. With options.tf32 their factors, centred values, are rounded to TF32; those of a float16 x are
// not where it has few pixels, over which the rounding would not average out.
//
// Both throw std::invalid_argument as the CPU library does, std::runtime_error where a launch fails.
void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean, const Options& options);

// Bytes of scratch memory for the forward pass; the backward pass needs none.
int64_t spd_covariance_workspace(const Tensor& x);

void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x,
                             const Options& options);

}  // namespace mirage::cuda
