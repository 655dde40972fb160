// The second kernel of feed_forward_stage's backward, after that of feed_forward_backward.h: back through the layer
// norm.
#pragma once

#include "feed_forward_backward_tile.h"
#include "sums.h"

namespace mirage::cuda {

// Of one value, to each warp; `room` is [warps, lanes].
MIRAGE_DEVICE float sum_over_warps(float x, float* room) {
  float value[1] = {x};
  sum_over_warps(value, kTileWarps, room);
  return value[0];
}

// grad_x = grad_y + what gnormal gives through the layer norm, and of each channel the sums that make the gradients of
// norm_weight and norm_bias. A lane has a pixel, a warp every eighth channel of it; a block takes 32 pixels at a time,
// of its part of them.
template <class T, int kBlocks>
MIRAGE_KERNEL(256, kBlocks <= 4 ? 2 : 1) feed_forward_norm_kernel(const FeedForwardBackwardArguments p) {
  constexpr int kCount = 2 * kBlocks;  // channels of a thread
  float* memory = reinterpret_cast<float*>(shared_memory());  // [4, warps, lanes]
  const int64_t plane = int64_t(p.height) * p.width, total = p.batch * p.channels * plane;
  const int64_t of_sample = (plane + kLanes - 1) / kLanes, steps = p.batch * of_sample;
  const int group = int(block_index());
  float of_weight[kCount] = {}, of_bias[kCount] = {};
  for (int64_t step = steps * group / p.groups; step < steps * (group + 1) / p.groups; ++step) {
    const int64_t sample = step / of_sample, n = step % of_sample * kLanes + lane_index();
    const bool known = n < plane;
    const int64_t row = n / p.width, column = n % p.width;
    const T* x = static_cast<const T*>(p.x) + sample * p.s_batch + row * p.s_row + column * p.s_column;
    const T* grad_y = static_cast<const T*>(p.grad_y) + sample * p.g_batch + row * p.g_row + column * p.g_column;
    const int64_t start = sample * p.channels * plane + n;
    float value[kCount], grad[kCount], sum = 0.0f, squares = 0.0f, along = 0.0f, whole = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = warp_index() + kTileWarps * i;
      value[i] = known && c < p.channels ? to_float(x[c * p.s_channel]) : 0.0f;
      grad[i] = 0.0f;
      sum += value[i];
    }
#pragma unroll 1
    for (int s = 0; s < p.splits; ++s) {
      const float* of_split = p.partial + s * total + start;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int c = warp_index() + kTileWarps * i;
        if (known && c < p.channels) grad[i] += of_split[c * plane];
      }
    }
    const float mean = sum_over_warps(sum, memory) / float(p.channels);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] = warp_index() + kTileWarps * i < p.channels ? value[i] - mean : 0.0f;
      squares = fmaf(value[i], value[i], squares);
    }
    const float variance = sum_over_warps(squares, memory + 256) / float(p.channels);
    const float rstd = 1.0f / sqrtf(variance + p.eps);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = warp_index() + kTileWarps * i;
      value[i] *= rstd;
      if (known) {
        of_weight[i] = fmaf(grad[i], value[i], of_weight[i]);
        of_bias[i] += grad[i];
      }
      grad[i] = c < p.channels ? grad[i] * weight_at<T>(p, p.norm_weight, c) : 0.0f;
      whole += grad[i];
      along = fmaf(grad[i], value[i], along);
    }
    whole = sum_over_warps(whole, memory + 512) / float(p.channels);
    along = sum_over_warps(along, memory + 768) / float(p.channels);
    T* grad_x = static_cast<T*>(p.grad_x) + start;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = warp_index() + kTileWarps * i;
      if (!known || c >= p.channels) continue;
      const float through = (grad[i] - whole - value[i] * along) * rstd;
      grad_x[c * plane] = from_float<T>(to_float(grad_y[c * p.g_channel]) + through);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int c = warp_index() + kTileWarps * i;
    const float weight = sum_of_warp(of_weight[i]), bias = sum_of_warp(of_bias[i]);
    if (lane_index() != 0 || c >= p.channels) continue;
    p.norm_sums[int64_t(group) * 2 * p.channels + c] = weight;
    p.norm_sums[int64_t(group) * 2 * p.channels + p.channels + c] = bias;
  }
}

}  // namespace mirage::cuda
