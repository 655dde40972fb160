// The second half of a MIRAGE block on a GPU: forward in one kernel and backward in three, each after one that packs
// the weights. The hidden tensor of 2M channels stays on chip. mirage/feed_forward_stage.h defines it. Tensors are on
// the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/feed_forward_stage.h"
#include "mirage/tensor.h"

namespace mirage::cuda {

// Why this problem has no kernel, in a few words; empty if it has one.
//
//   x                                           [B, C, H, W]  any strides, f32 / f16 / bf16, C <= 256
//   norm_weight ... project_out, see the header above          all of one dtype, that of x or f32
std::string feed_forward_stage_problem(const Tensor& x, const Tensor& project_out, const Options& options);

// Bytes of workspace for feed_forward_stage: the packed weights, and for small images the partial results of blocks
// that share a tile.
int64_t feed_forward_stage_workspace(const Tensor& x, const Tensor& project_out, const Options& options);

// y: contiguous, dtype and shape of x, not overlapping it. Runs on options.stream; sums are float. Throws
// std::invalid_argument as the CPU library does, and std::runtime_error if the launch fails.
void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out, const Tensor& y,
                        const Options& options);

// The same for backward, up to C = 240 (f32: 96) if the GPU has the shared memory (an A100 up to 128, f32 64).
// Recomputes forward from x. grad_y: any strides, dtype of x; grad_x: contiguous, dtype of x; `gradients`: see
// mirage/feed_forward_stage.h. Workspace: C channels of float for each of the blocks that share a tile, and the weight
// gradients of each range of tiles, one range per SM at most.
std::string feed_forward_stage_backward_problem(const Tensor& x, const Tensor& project_out, const Options& options);

int64_t feed_forward_stage_backward_workspace(const Tensor& x, const Tensor& project_out, const Options& options);

void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& norm_weight,
                                 const Tensor& norm_bias, double eps, const Tensor& project_in, const Tensor& dwconv,
                                 const Tensor& project_out, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients, const Options& options);

}  // namespace mirage::cuda
