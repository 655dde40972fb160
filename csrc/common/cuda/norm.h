// The layer norm of a pixel, by one thread: for stages that have its channels in reach of each.
#pragma once

#include "sums.h"
#include "tiles.h"

namespace mirage::cuda {

// Of a pixel: mean and reciprocal deviation.
struct alignas(8) NormMoments {
  float mean, rstd;
};

// Of `channels` elements `stride` apart.
template <class T, class Stride>
MIRAGE_DEVICE NormMoments norm_moments(const T* pixel, Stride stride, int channels, float eps) {
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 8
  for (int c = 0; c < channels; ++c) sum += to_float(pixel[c * stride]);
  const float mean = sum / float(channels);
#pragma unroll 8
  for (int c = 0; c < channels; ++c) {
    const float centred = to_float(pixel[c * stride]) - mean;
    squares = fmaf(centred, centred, squares);
  }
  return {mean, 1.0f / sqrtf(squares / float(channels) + eps)};
}

// In place, with the norm's own weight and bias [channels].
template <class T>
MIRAGE_DEVICE void normalise_pixel(T* pixel, int stride, int channels, float eps, const float* weight,
                                   const float* bias) {
  const NormMoments moments = norm_moments(pixel, stride, channels, eps);
#pragma unroll 8
  for (int c = 0; c < channels; ++c) {
    const float scaled = (to_float(pixel[c * stride]) - moments.mean) * moments.rstd;
    pixel[c * stride] = from_float<T>(fmaf(scaled, weight[c], bias[c]));
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Tensors [B, C, H, W], grad_x contiguous.
struct NormGradient {
  const void *x, *grad_y;
  int64_t s_batch, s_channel, s_row, s_column, g_batch, g_channel, g_row, g_column;
  void* grad_x;
  float eps;
  int batch, channels, height, width;
  int groups;   // blocks
  float* sums;  // [groups, 2, C]: of the gradients of weight and bias
};

// Of pixel n of a plane.
MIRAGE_DEVICE int64_t row_of(int64_t n, int width) { return n <= INT32_MAX ? int(n) / width : n / width; }

// grad_x = grad_y + what the gradient of the norm's output gives through it, and of each channel the sums that make the
// gradients of weight and bias. A lane has a pixel, a warp every eighth channel of it, kCount at most; a block takes 32
// pixels at a time, of its part of them.
//
// Output: load(sample, n, known, grad) reads what of the output's gradient is in memory for pixel n of the plane, of the
// warp's channels, and finish(sample, channel, that, normalised x) makes it the gradient; weight(channel) is the norm's.
// `memory`: [4, warps, lanes].
template <class T, int kCount, class Output>
MIRAGE_DEVICE void return_from_norm(const NormGradient& p, const Output& output, float* memory) {
  const int64_t plane = int64_t(p.height) * p.width;
  const int64_t of_sample = (plane + kLanes - 1) / kLanes, steps = p.batch * of_sample;
  const int group = int(block_index()), warp = warp_index();
  const int64_t begin = steps * group / p.groups;
  int64_t left = steps * (group + 1) / p.groups - begin, sample = begin / of_sample;
  float of_weight[kCount] = {}, of_bias[kCount] = {};
#pragma unroll 1
  for (int64_t first = begin % of_sample * kLanes; left > 0; --left) {
    const int64_t n = first + lane_index();
    const bool known = n < plane;
    const int64_t row = row_of(n, p.width), column = n - row * p.width;
    const T* x = static_cast<const T*>(p.x) + sample * p.s_batch + row * p.s_row + column * p.s_column;
    const T* grad_y = static_cast<const T*>(p.grad_y) + sample * p.g_batch + row * p.g_row + column * p.g_column;
    float value[kCount], grad[kCount], sum = 0.0f, squares = 0.0f, along = 0.0f, whole = 0.0f;
    x = settled(x + warp * p.s_channel);
#pragma unroll
    for (int i = 0; i < kCount; ++i, x += kTileWarps * p.s_channel) {
      const bool exists = known && warp + kTileWarps * i < p.channels;
      value[i] = exists ? to_float(load_constant(x)) : 0.0f;
      sum += value[i];
    }
    output.template load<kCount>(sample, n, known, grad);
    const float mean = sum_over_warps(sum, kTileWarps, memory) / float(p.channels);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] = warp + kTileWarps * i < p.channels ? value[i] - mean : 0.0f;
      squares = fmaf(value[i], value[i], squares);
    }
    const float variance = sum_over_warps(squares, kTileWarps, memory + 256) / float(p.channels);
    const float rstd = 1.0f / sqrtf(variance + p.eps);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = warp + kTileWarps * i;
      value[i] *= rstd;
      if (known && c < p.channels) {
        grad[i] = output.finish(sample, c, grad[i], value[i]);
        of_weight[i] = fmaf(grad[i], value[i], of_weight[i]);
        of_bias[i] += grad[i];
      }
      grad[i] = c < p.channels ? grad[i] * output.weight(c) : 0.0f;
      whole += grad[i];
      along = fmaf(grad[i], value[i], along);
    }
    whole = sum_over_warps(whole, kTileWarps, memory + 512) / float(p.channels);
    along = sum_over_warps(along, kTileWarps, memory + 768) / float(p.channels);
    grad_y = settled(grad_y + warp * p.g_channel);
    T* grad_x = settled(static_cast<T*>(p.grad_x) + (sample * p.channels + warp) * plane + n);
#pragma unroll
    for (int i = 0; i < kCount; ++i, grad_y += kTileWarps * p.g_channel, grad_x += kTileWarps * plane) {
      if (!known || warp + kTileWarps * i >= p.channels) continue;
      const float through = (grad[i] - whole - value[i] * along) * rstd;
      *grad_x = from_float<T>(to_float(load_constant(grad_y)) + through);
    }
    first += kLanes;
    if (first >= plane) first = 0, ++sample;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int c = warp + kTileWarps * i;
    const float weight = sum_of_warp(of_weight[i]), bias = sum_of_warp(of_bias[i]);
    if (lane_index() != 0 || c >= p.channels) continue;
    p.sums[int64_t(group) * 2 * p.channels + c] = weight;
    p.sums[int64_t(group) * 2 * p.channels + p.channels + c] = bias;
  }
}

}  // namespace mirage::cuda
