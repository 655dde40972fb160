// Covariance of channels over pixels, regularised to be positive definite, on a GPU. mirage/spd_covariance.h defines
// it. Tensors are f32, f16 or bf16 on the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Matrix products are of float. With options.tf32 their factors, which are centred, are rounded to TF32; not for
// float16 x with few pixels, over which the rounding would not average out.
//
// Both throw std::invalid_argument as the CPU library does, and std::runtime_error if a launch fails.
void spd_covariance_forward(const Tensor& x, double eps, const Tensor& y, const Tensor& mean, const Options& options);

// Bytes of workspace for the forward pass; the backward pass needs none.
int64_t spd_covariance_workspace(const Tensor& x);

void spd_covariance_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& grad_x,
                             const Options& options);

}  // namespace mirage::cuda
