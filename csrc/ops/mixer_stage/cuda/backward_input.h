// The kernel of mixer_stage's backward for BatchNorm and the layer norm, down to x.
#pragma once

#include "backward.h"
#include "common/cuda/norm.h"

namespace mirage::cuda {

// Provides the gradients of n1, n2 and n3, one after the other. That of n2 comes from those of BatchNorm's output and
// of proj_out's input.
template <class T>
struct MixerNormOutput {
  const MixerBackwardArguments& p;
  int padded;  // channels of a branch, rounded up to 16

  template <int kCount>
  MIRAGE_DEVICE void load(int64_t sample, int64_t n, bool in_bounds, float (&grad)[kCount]) const {
    const int64_t plane = p.plane(), start = sample * p.branch * plane + n;
    const float* of_sample = p.batch_norm + sample * 3 * p.branch;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int channel = warp_index() + kTileWarps * i, third = (channel >= p.branch) + (channel >= 2 * p.branch);
      const int c = channel - third * p.branch;
      grad[i] = 0.0f;
      if (!in_bounds || c >= p.branch) continue;
      const void* map = third == 0 ? p.grad_n1 : third == 1 ? p.grad_bn : p.grad_n3;
      const int64_t place = start + c * plane;
      grad[i] = to_float(load_constant(static_cast<const T*>(map) + place));
      if (third != 1) continue;
      const float through = fmaf(grad[i], of_sample[c], of_sample[2 * p.branch + c]);
      grad[i] = through + to_float(load_constant(static_cast<const T*>(p.grad_total) + place));
    }
  }

  MIRAGE_DEVICE float finish(int64_t sample, int channel, float grad, float normal) const {
    const int c = channel - p.branch;
    if (c < 0 || c >= p.branch) return grad;
    const float input = fmaf(normal, weight(channel), p.packed[3 * padded + channel]);
    return fmaf(p.batch_norm[(sample * 3 + 1) * p.branch + c], input, grad);
  }

  MIRAGE_DEVICE float weight(int channel) const { return p.packed[channel]; }
};

template <class T, int kChannelTiles>
MIRAGE_KERNEL(256, kChannelTiles <= 2 ? 2 : 1) mixer_input_backward_kernel(const MixerBackwardArguments p) {
  const NormGradient gradient{p.x,         p.grad_y, p.s_batch,  p.s_channel, p.s_row,      p.s_column, p.g_batch,
                              p.g_channel, p.g_row,  p.g_column, p.grad_x,    p.eps,        p.batch,    3 * p.branch,
                              p.height,    p.width,  p.input.blocks, p.input.sums};
  layer_norm_backward<T, 6 * kChannelTiles>(gradient, MixerNormOutput<T>{p, 16 * kChannelTiles},
                                            reinterpret_cast<float*>(shared_memory()));
}

}  // namespace mirage::cuda
