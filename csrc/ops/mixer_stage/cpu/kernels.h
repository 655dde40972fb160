#pragma once

#include "common/cpu/isa.h"
#include "mirage/mixer_stage.h"

MIRAGE_DECLARE_KERNEL(void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                                       const MixerOptions& options, const MixerStatistics& statistics, const Tensor& y))
MIRAGE_DECLARE_KERNEL(void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights,
                                                const Tensor& branch_scale, const MixerOptions& options,
                                                const MixerStatistics& statistics, const Tensor& grad_x,
                                                const MixerGradients& gradients))
