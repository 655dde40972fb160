// The second half of a MIRAGE block on a GPU in one kernel, and its gradients in three, after one that packs the
// weights: the hidden tensor of 2M channels never leaves the chip. mirage/feed_forward_stage.h says what is computed;
// tensors live on the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/feed_forward_stage.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Why these cannot be computed here, in a few words; empty where they can.
//
//   x                                           [B, C, H, W]  any strides, f32 / f16 / bf16, C <= 256
//   norm_weight ... project_out, see the header above          of one dtype, that of x or f32
std::string feed_forward_stage_problem(const Tensor& x, const Tensor& project_out, const Options& options);

// Bytes of scratch memory that feed_forward_stage needs: the weights in the order of its kernel, and for small images sums
// of the blocks that share a tile.
int64_t feed_forward_stage_workspace(const Tensor& x, const Tensor& project_out, const Options& options);

// y: contiguous, dtype and shape of x, no memory in common with it. Runs on options.stream; sums are in float. Throws
// std::invalid_argument as the CPU library does, std::runtime_error where the launch fails.
void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out, const Tensor& y,
                        const Options& options);

// The same of backward, with C <= 240 (f32: 96), where the GPU has the shared
// memory (an A100 up to 128, f32 64). Recomputes forward from x. grad_y: any strides, dtype of x; grad_x:
// contiguous, dtype of x; `gradients`: see mirage/feed_forward_stage.h. Scratch memory: C channels of float for each of
// the blocks that share a tile, and the gradients of the weights for each of those that do not, one for a
// multiprocessor at most.
std::string feed_forward_stage_backward_problem(const Tensor& x, const Tensor& project_out, const Options& options);

int64_t feed_forward_stage_backward_workspace(const Tensor& x, const Tensor& project_out, const Options& options);

void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& norm_weight,
                                 const Tensor& norm_bias, double eps, const Tensor& project_in, const Tensor& dwconv,
                                 const Tensor& project_out, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients, const Options& options);

}  // namespace mirage::cuda
