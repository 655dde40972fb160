// A whole MIRAGE block without gradients: y = z + ffn(LayerNorm(z)) with z = x + mixer(LayerNorm(x)), the batch norm of
// the gated CNN by its running statistics. The two stages one after the other, the second over the result of the first.
#pragma once

#include "mirage/mixer_stage.h"
#include "mirage/tensor.h"

namespace mirage {

// M pairs of hidden channels. All contiguous, of any type.
struct FeedForwardWeights {
  Tensor norm_weight, norm_bias;  // [C]
  Tensor project_in, dwconv;      // [2M, C], [2M, 9]
  Tensor project_out;             // [C, M]
};

struct BlockOptions {
  double norm1_eps, bn_eps, norm2_eps;
};

// x [B, C, H, W] of any strides, f32 / f64 / f16 / bf16; y contiguous, of the dtype of x, not x itself. Scratch memory as
// that of the stages, and the small statistics of mixer_stage.
void transformer_block(const Tensor& x, const MixerWeights& mixer, const FeedForwardWeights& feed_forward,
                       const BlockOptions& options, const Tensor& y);

}  // namespace mirage
