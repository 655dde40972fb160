#pragma once

#include "common/cpu/isa.h"
#include "mirage/mixer_stage.h"

MIRAGE_DECLARE_KERNEL(void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                                       const MixerOptions& options, const MixerStatistics& statistics, const Tensor& y))
// Parts of a map: x and y are whole maps (mirage/region.h), of which only what the cuts take in and, in x, its halo need
// be there. y is written in whole lines.
MIRAGE_DECLARE_KERNEL(void mixer_stage_sums(const Tensor& x, const Cuts& rows, const Cuts& columns,
                                            const MixerWeights& weights, const MixerOptions& options,
                                            const Tensor& sums))
MIRAGE_DECLARE_KERNEL(void mixer_stage_statistics(const Tensor& sums, const Tensor& pixels, const MixerWeights& weights,
                                                  const MixerOptions& options, const Tensor& attention,
                                                  const Tensor& kernels))
MIRAGE_DECLARE_KERNEL(void mixer_stage_apply(const Tensor& x, const Cuts& rows, const Cuts& columns,
                                             const MixerWeights& weights, const MixerOptions& options,
                                             const Tensor& attention, const Tensor& kernels, const Tensor& y))
MIRAGE_DECLARE_KERNEL(void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights,
                                                const Tensor& branch_scale, const MixerOptions& options,
                                                const MixerStatistics& statistics, const Tensor& grad_x,
                                                const MixerGradients& gradients))
