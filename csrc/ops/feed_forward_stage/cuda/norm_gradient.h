// The second kernel of feed_forward_stage's backward, after that of backward.h: the backward of the layer norm.
#pragma once

#include "backward_tile.h"
#include "common/cuda/norm.h"

namespace mirage::cuda {

// Provides gnormal as the sum over the blocks that shared a tile.
template <class T>
struct FeedForwardNormOutput {
  const FeedForwardBackwardArguments& p;

  template <int kCount>
  MIRAGE_DEVICE void load(int64_t sample, int64_t n, bool in_bounds, float (&grad)[kCount]) const {
    const int64_t plane = int64_t(p.height) * p.width, total = p.batch * p.channels * plane;
    const float* from = p.partial + sample * p.channels * plane + n;
#pragma unroll
    for (int i = 0; i < kCount; ++i) grad[i] = 0.0f;
#pragma unroll 1
    for (int s = 0; s < p.splits; ++s, from += total) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int c = warp_index() + kTileWarps * i;
        if (in_bounds && c < p.channels) grad[i] += from[c * plane];
      }
    }
  }

  MIRAGE_DEVICE float finish(int64_t, int, float grad, float) const { return grad; }
  MIRAGE_DEVICE float weight(int c) const { return weight_at<T>(p, p.norm_weight, c); }
};

template <class T, int kChannelTiles>
MIRAGE_KERNEL(256, kChannelTiles <= 4 ? 2 : 1) feed_forward_norm_kernel(const FeedForwardBackwardArguments p) {
  const NormGradient gradient{p.x,       p.grad_y,  p.s_batch, p.s_channel, p.s_row,  p.s_column, p.g_batch,
                              p.g_channel, p.g_row, p.g_column, p.grad_x,   p.eps,    p.batch,    p.channels,
                              p.height,  p.width,   p.groups,  p.norm_sums};
  layer_norm_backward<T, 2 * kChannelTiles>(gradient, FeedForwardNormOutput<T>{p},
                                            reinterpret_cast<float*>(shared_memory()));
}

}  // namespace mirage::cuda
