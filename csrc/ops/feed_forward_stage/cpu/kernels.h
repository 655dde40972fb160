#pragma once

#include "common/cpu/isa.h"
#include "mirage/feed_forward_stage.h"

namespace mirage::cpu {

// Pixels of a map.
struct Region { int64_t row, column, rows, columns; };

}  // namespace mirage::cpu

// x and y are whole maps, of which only the region and, in x, its halo need be there. y is written in whole lines. Where it
// is x, both are contiguous and the region is all of it.
MIRAGE_DECLARE_KERNEL(void feed_forward_stage(const Tensor& x, const FeedForwardWeights& weights,
                                              const FeedForwardOptions& options, const Region& region, const Tensor& y,
                                              const Tensor* hidden, const Tensor& scale))
MIRAGE_DECLARE_KERNEL(void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x,
                                                       const FeedForwardWeights& weights,
                                                       const FeedForwardOptions& options, const Tensor* hidden,
                                                       const Tensor& grad_x, const FeedForwardGradients& gradients))
