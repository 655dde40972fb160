// Layer norm over the channels of a pixel, for stages in which each thread can reach all channels; and its backward.
#pragma once

#include "sums.h"
#include "tiles.h"

namespace mirage::cuda {

// Mean and reciprocal standard deviation of a pixel.
struct alignas(8) NormMoments {
  float mean, rstd;
};

// A mean that was summed in one go is off by some of its last bits, which is a good part of the deviation where that is
// small beside the mean. From the averages of the deviations and of their squares: corrects the mean, and returns the
// variance around it.
MIRAGE_DEVICE float correct_mean(float& mean, float deviation, float square) {
  mean += deviation;
  const float variance = fmaf(-deviation, deviation, square);
  return variance >= 0.0f ? variance : square;  // rounding, or infinite squares
}

// Computes them in two passes over `channels` elements that are `stride` apart.
template <class T, class Stride>
MIRAGE_DEVICE NormMoments norm_moments(const T* pixel, Stride stride, int channels, float eps) {
  float sum = 0.0f, rest = 0.0f, squares = 0.0f;
#pragma unroll 8
  for (int c = 0; c < channels; ++c) sum += to_float(pixel[c * stride]);
  float mean = sum / float(channels);
#pragma unroll 8
  for (int c = 0; c < channels; ++c) {
    const float centred = to_float(pixel[c * stride]) - mean;
    rest += centred;
    squares = fmaf(centred, centred, squares);
  }
  const float variance = correct_mean(mean, rest / float(channels), squares / float(channels));
  return {mean, 1.0f / sqrtf(variance + eps)};
}

// Normalises a pixel in place, and applies the norm's weight and bias [channels].
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

// ---- backward ------------------------------------------------------------------------------------------------------

// Arguments of the backward of a layer norm with which a stage begins, y = x + stage(layer_norm(x)). Tensors are [B, C,
// H, W], grad_x is contiguous.
struct NormGradient {
  const void *x, *grad_y;
  int64_t s_batch, s_channel, s_row, s_column, g_batch, g_channel, g_row, g_column;
  void* grad_x;
  float eps;
  int batch, channels, height, width;
  int groups;   // number of thread blocks
  float* sums;  // [groups, 2, C]: each block's gradients of weight and bias
};

// The row of pixel n of a plane.
MIRAGE_DEVICE int64_t row_of(int64_t n, int width) { return n <= INT32_MAX ? int(n) / width : n / width; }

// Normalises a pixel whose channels are spread over the warps of a block, every eighth in each, and returns its
// reciprocal standard deviation. `sum` is that of this warp's values, which are zero beyond the channels. `memory`:
// [2, warps, lanes].
template <int kCount>
MIRAGE_DEVICE float normalise_held(float (&value)[kCount], float sum, int channels, float eps, float* memory) {
  const float mean = sum_over_warps(sum, kTileWarps, memory) / float(channels);
  float rest = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = warp_index() + kTileWarps * i < channels ? value[i] - mean : 0.0f;
    rest += value[i];
  }
  rest = sum_over_warps(rest, kTileWarps, memory + kTileThreads) / float(channels);  // the mean's own rounding error
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = warp_index() + kTileWarps * i < channels ? value[i] - rest : 0.0f;
    squares = fmaf(value[i], value[i], squares);
  }
  const float variance = sum_over_warps(squares, kTileWarps, memory) / float(channels);
  const float rstd = 1.0f / sqrtf(variance + eps);
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] *= rstd;
  return rstd;
}

// Stores a block's gradients of weight and bias, of which each lane has a part.
template <int kCount>
MIRAGE_DEVICE void store_norm_sums(const NormGradient& p, const float (&grad_weight)[kCount],
                                   const float (&grad_bias)[kCount]) {
  float* sums = p.sums + block_index() * 2 * p.channels;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int c = warp_index() + kTileWarps * i;
    const float weight = warp_all_reduce_sum(grad_weight[i]), bias = warp_all_reduce_sum(grad_bias[i]);
    if (lane_index() == 0 && c < p.channels) sums[c] = weight, sums[p.channels + c] = bias;
  }
}

// grad_x = grad_y + the gradient through the norm; and each block's sums for the gradients of weight and bias. A lane
// has a pixel, a warp every eighth of its channels (kCount at most). A block takes its share of the pixels, 32 at a
// time.
//
// `output` provides the gradient of the norm's output: load(sample, n, in_bounds, grad) reads what memory holds of it
// for the warp's channels of pixel n of the plane, and finish(sample, channel, grad, normalised x) completes it.
// weight(channel) is the norm's weight. `memory`: [4, warps, lanes].
template <class T, int kCount, class Output>
MIRAGE_DEVICE void layer_norm_backward(const NormGradient& p, const Output& output, float* memory) {
  const int64_t plane = int64_t(p.height) * p.width;
  const int64_t of_sample = (plane + kLanes - 1) / kLanes, steps = p.batch * of_sample;
  const int group = int(block_index()), warp = warp_index();
  const int64_t begin = steps * group / p.groups;
  int64_t left = steps * (group + 1) / p.groups - begin, sample = begin / of_sample;
  float grad_weight[kCount] = {}, grad_bias[kCount] = {};
#pragma unroll 1
  for (int64_t first = begin % of_sample * kLanes; left > 0; --left) {
    const int64_t n = first + lane_index();
    const bool in_bounds = n < plane;
    const int64_t row = row_of(n, p.width), column = n - row * p.width;
    const T* x = static_cast<const T*>(p.x) + sample * p.s_batch + row * p.s_row + column * p.s_column;
    const T* grad_y = static_cast<const T*>(p.grad_y) + sample * p.g_batch + row * p.g_row + column * p.g_column;
    float value[kCount], grad[kCount], sum = 0.0f, mean_grad = 0.0f, mean_product = 0.0f;
    x = opaque_global(x + warp * p.s_channel);
#pragma unroll
    for (int i = 0; i < kCount; ++i, x += kTileWarps * p.s_channel) {
      const bool exists = in_bounds && warp + kTileWarps * i < p.channels;
      value[i] = exists ? to_float(load_constant(x)) : 0.0f;
      sum += value[i];
    }
    output.template load<kCount>(sample, n, in_bounds, grad);
    const float rstd = normalise_held(value, sum, p.channels, p.eps, memory);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = warp + kTileWarps * i;
      if (in_bounds && c < p.channels) {
        grad[i] = output.finish(sample, c, grad[i], value[i]);
        grad_weight[i] = fmaf(grad[i], value[i], grad_weight[i]);
        grad_bias[i] += grad[i];
      }
      grad[i] = c < p.channels ? grad[i] * output.weight(c) : 0.0f;
      mean_grad += grad[i];
      mean_product = fmaf(grad[i], value[i], mean_product);
    }
    mean_grad = sum_over_warps(mean_grad, kTileWarps, memory + 512) / float(p.channels);
    mean_product = sum_over_warps(mean_product, kTileWarps, memory + 768) / float(p.channels);
    grad_y = opaque_global(grad_y + warp * p.g_channel);
    T* grad_x = opaque_global(static_cast<T*>(p.grad_x) + (sample * p.channels + warp) * plane + n);
#pragma unroll
    for (int i = 0; i < kCount; ++i, grad_y += kTileWarps * p.g_channel, grad_x += kTileWarps * plane) {
      if (!in_bounds || warp + kTileWarps * i >= p.channels) continue;
      const float through = (grad[i] - mean_grad - value[i] * mean_product) * rstd;
      *grad_x = from_float<T>(to_float(load_constant(grad_y)) + through);
    }
    first += kLanes;
    if (first >= plane) first = 0, ++sample;
  }
  store_norm_sums(p, grad_weight, grad_bias);
}

}  // namespace mirage::cuda
