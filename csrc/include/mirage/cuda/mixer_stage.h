// The first half of a MIRAGE block on a GPU in three kernels, and its gradients in ten: in forward x is read twice, y written,
// and nothing else of the size of a feature map but the layer norm's moments exists. mirage/mixer_stage.h says what is computed; tensors live on the current
// device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/mixer_stage.h"

namespace mirage::cuda {

// Why these cannot be computed here, in a few words; empty where they can.
//
//   x        [B, C, H, W]  any strides, f32 / f16 / bf16, C <= 240
//   weights  of one dtype, that of x or f32
std::string mixer_stage_problem(const Tensor& x, const Options& options);

// Bytes of scratch memory that mixer_stage needs: two floats a pixel, some sums, and the weights in the order of its
// kernels. hidden: channels of the gated CNN, h in mirage/mixer_stage.h.
int64_t mixer_stage_workspace(const Tensor& x, int64_t heads, int64_t hidden, const Options& options);

// y: contiguous, dtype and shape of x, no memory in common with it. branch_scale [B] and statistics: float, on the device;
// branch_scale.data may be null, for ones.
// Runs on options.stream; sums are in float. Throws std::invalid_argument as the CPU library does, std::runtime_error
// where a launch fails.
void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& mixer,
                 const MixerStatistics& statistics, const Tensor& y, const Options& options);

// The same of backward, with C <= 240 (f32: 192, on an A100, which has less shared memory, 96) and at least one pixel.
// Recomputes forward from x. grad_y: any strides, dtype of x; grad_x: contiguous, dtype of x; `gradients`: float, see
// mirage/mixer_stage.h. Scratch memory: seven maps of C / 3 channels of the dtype of x, two floats a pixel, and the gradients
// of the weights for each block of the kernels, one or two for a multiprocessor at most.
std::string mixer_stage_backward_problem(const Tensor& x, const Options& options);

int64_t mixer_stage_backward_workspace(const Tensor& x, int64_t heads, int64_t hidden, const Options& options);

void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& mixer, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients, const Options& options);

}  // namespace mirage::cuda
