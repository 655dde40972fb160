// The first half of a MIRAGE block on a GPU: forward in three kernels, backward in ten. Forward reads x twice and
// writes y; of the size of a feature map there is nothing else but the layer norm's moments. mirage/mixer_stage.h
// defines it. Tensors are on the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/mixer_stage.h"

namespace mirage::cuda {

// Why this problem has no kernel, in a few words; empty if it has one.
//
//   x        [B, C, H, W]  any strides, f32 / f16 / bf16, C <= 240
//   weights  all of one dtype, that of x or f32
std::string mixer_stage_problem(const Tensor& x, const Options& options);

// Bytes of workspace for mixer_stage: two floats per pixel, some sums, and the packed weights. hidden: channels of the
// gated CNN, h in mirage/mixer_stage.h.
int64_t mixer_stage_workspace(const Tensor& x, int64_t heads, int64_t hidden, const Options& options);

// y: contiguous, dtype and shape of x, not overlapping it. branch_scale [B] and statistics: float, on the device;
// branch_scale.data may be null, which means ones. Runs on options.stream; sums are float. Throws std::invalid_argument
// as the CPU library does, and std::runtime_error if a launch fails.
void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& mixer,
                 const MixerStatistics& statistics, const Tensor& y, const Options& options);

// The same for backward, up to C = 240 (f32: 192; on an A100, which has less shared memory, 96), with at least one
// pixel. Recomputes forward from x. grad_y: any strides, dtype of x; grad_x: contiguous, dtype of x; `gradients`:
// float, see mirage/mixer_stage.h. Workspace: seven activations of C / 3 channels in the dtype of x, two floats per
// pixel, and the weight gradients of each block of the kernels, one or two per SM at most.
std::string mixer_stage_backward_problem(const Tensor& x, const Options& options);

int64_t mixer_stage_backward_workspace(const Tensor& x, int64_t heads, int64_t hidden, const Options& options);

void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& mixer, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients, const Options& options);

}  // namespace mirage::cuda
