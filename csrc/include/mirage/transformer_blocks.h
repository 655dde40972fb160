// MIRAGE blocks one after the other, without gradients: each is y = z + ffn(LayerNorm(z)) with z = x + mixer(LayerNorm(x)),
// the batch norm of the gated CNN by its running statistics.
#pragma once

#include "mirage/feed_forward_stage.h"
#include "mirage/mixer_stage.h"
#include "mirage/tensor.h"

namespace mirage {

struct BlockWeights {
  MixerWeights mixer;
  FeedForwardWeights feed_forward;
  double norm1_eps, bn_eps, norm2_eps;
};

// x [B, C, H, W] of any strides, f32 / f64 / f16 / bf16; `count` blocks, at least one, on C channels; y contiguous, of the
// dtype of x, not x itself. The second half of a block is written over the result of the first. Scratch memory as that of
// the stages, the small statistics of mixer_stage, and for more than one block a map like y.
void transformer_blocks(const Tensor& x, const BlockWeights* blocks, int64_t count, const Tensor& y);

}  // namespace mirage
