// The small kernels of mixer_stage's backward: before the tiles what they read, and after them the gradients of the kernel
// generator and of BatchNorm's statistics.
#pragma once

#include "backward_pack.h"
#include "finalise.h"

namespace mirage::cuda {

// ---- before the tiles ----------------------------------------------------------------------------------------------

// The layer norm's moments, a thread a pixel of the batch.
template <class T>
MIRAGE_DEVICE void keep_moments(const MixerArguments& p, int64_t block) {
  const int64_t i = block * kTileThreads + thread_index(), plane = p.plane();
  if (i >= p.batch * plane) return;
  const int64_t sample = i / plane, n = i % plane;
  const T* pixel = static_cast<const T*>(p.x) + sample * p.s_batch + n / p.width * p.s_row + n % p.width * p.s_column;
  p.moments[i] = norm_moments(pixel, p.s_channel, 3 * p.branch, p.eps);
}

// A sample's attention, itself and transposed, and its generated kernels, from what forward has kept.
template <class Kind>
MIRAGE_DEVICE void pack_statistics(const MixerBackwardArguments& p, int sample) {
  using T = typename Kind::Element;
  const int depth = p.depth(), of_head = (2 * depth + 2) * depth;
  const float* attention = p.attention + int64_t(sample) * p.heads * of_head;
  const auto value = [&](int row, int column) {
    return attention[row / depth * of_head + row % depth * depth + column % depth];
  };
  pack_heads<Kind>(p, mixer_attention_steps<T>(p, sample), value);
  pack_sample<Kind>(p, sample, 0, [&](int row, int column) { return value(column, row); });
  const float* kernels = p.kernels + int64_t(sample) * p.branch * kMixerTaps;
  for (int i = thread_index(); i < p.branch * kMixerTaps; i += kTileThreads) {
    mixer_kernels<T>(p, sample)[place_of_tap(i)] = kernels[i];
  }
}

// A block for what is no step, one for each step of the weights, one for each sample, and the others for the moments.
template <class Kind, class W>
MIRAGE_KERNEL(256, 2) mixer_prepare_backward_kernel(const MixerBackwardArguments p) {
  using T = typename Kind::Element;
  const int forward = MixerSteps(p).of_weights(), backward = MixerBackwardSteps(p).weights;
  int64_t i = block_index();
  if (i == 0) {
    pack_floats<W>(p);
    pack_backward_taps<T, W>(p);
    return;
  }
  if ((i -= 1) < forward) return pack_step<Kind, W>(p, int(i));
  if ((i -= forward) < backward) return pack_backward_step<Kind, W>(p, int(i));
  if ((i -= backward) < p.batch) return pack_statistics<Kind>(p, int(i));
  keep_moments<T>(p, i - p.batch);
}

// ---- after the tiles -----------------------------------------------------------------------------------------------

// store(i, product of column i of a matrix [rows, branch] and `vector`); a warp has 32 of the columns and every eighth row.
// `room`: [warps, lanes].
template <class W, class Store>
MIRAGE_DEVICE void multiply_transposed(const W* matrix, const float* vector, int rows, int branch, float* room,
                                       Store store) {
  for (int first = 0; first < branch; first += kLanes) {
    const int i = first + lane_index();
    float sum[1] = {};
#pragma unroll 8
    for (int row = warp_index(); row < rows; row += kTileWarps) {
      if (i < branch) sum[0] = fmaf(to_float(matrix[int64_t(row) * branch + i]), vector[row], sum[0]);
    }
    sync_block();  // room may still be read
    sum_over_warps(sum, kTileWarps, room);
    if (warp_index() == 0 && i < branch) store(i, sum[0]);
  }
  sync_block();
}

MIRAGE_ANYWHERE int generator_floats(const MixerArguments& p) {
  const int taps = p.branch * kMixerTaps;
  return taps + (taps > kTileThreads ? taps : kTileThreads) + 7 * p.branch;
}

// A block a sample: the gradients of the generated kernels, to grad_kernels [B, c, 49], and through the generator. `vectors`
// [B, 6, c]: of gic1's detail rows, generator_in and generator_out what they multiply, then the gradients of what the second
// and the first make, and of what the first multiplies.
template <class W>
MIRAGE_KERNEL(256) mixer_generator_backward_kernel(const MixerBackwardArguments p, const int tiles_of_sample) {
  const int branch = p.branch, taps = branch * kMixerTaps, sample = int(block_index());
  float *grad = reinterpret_cast<float*>(shared_memory()), *room = grad + taps;
  float* vector = room + (taps > kTileThreads ? taps : kTileThreads);  // [7, c], the last before its GELU
  const PartsOfSample parts(p.detail, p.batch, tiles_of_sample, sample);
  sum_parts<kTileThreads>(parts.first, parts.count, parts.stride, taps, room, grad);
  for (int i = thread_index(); i < taps; i += kTileThreads) p.grad_kernels[int64_t(sample) * taps + i] = grad[i];
  const MixerBatchNorm batch_norm(p);
  for (int c = thread_index(); c < branch; c += kTileThreads) {
    vector[c] = batch_norm(c)(p.branch_mean[int64_t(sample) * branch + c]);
  }
  sync_block();
  const W* rows = static_cast<const W*>(p.gic1) + int64_t(2 * p.hidden - branch) * branch;
  const W *first = static_cast<const W*>(p.generator_in), *second = static_cast<const W*>(p.generator_out);
  float *of_second = vector + 3 * branch, *of_first = of_second + branch, *of_input = of_first + branch;
  multiply_vector(rows, vector, branch, [&](int i, float sum) { vector[branch + i] = sum; });
  sync_block();
  multiply_vector(first, vector + branch, branch, [&](int i, float sum) {
    vector[2 * branch + i] = gelu<float>(sum), vector[6 * branch + i] = sum;
  });
  sync_block();
  multiply_transposed(second, grad, taps, branch, room, [&](int i, float sum) {
    float slope;
    gelu_with_slope<float>(vector[6 * branch + i], slope);
    of_second[i] = sum * slope;
  });
  multiply_transposed(first, of_second, branch, branch, room, [&](int i, float sum) { of_first[i] = sum; });
  multiply_transposed(rows, of_first, branch, branch, room, [&](int i, float sum) { of_input[i] = sum; });
  for (int i = thread_index(); i < 6 * branch; i += kTileThreads) {
    p.vectors[int64_t(sample) * 6 * branch + i] = vector[i];
  }
}

// BatchNorm's gradients, a warp a channel: of its weight and bias; and `batch_norm` [B, 3, c], of which the gradient of its
// input is made: factors of the gradient of its output and of the input, and what is added.
template <class W>
MIRAGE_KERNEL(256) mixer_batch_norm_backward_kernel(const MixerBackwardArguments p) {
  const int branch = p.branch, c = int(block_index()) * kTileWarps + warp_index();
  if (c >= branch) return;
  const float mean = p.batch_mean[c], inverse = 1.0f / sqrtf(p.batch_var[c] + p.bn_eps);
  float of_bias = 0.0f, of_weight = 0.0f;
  for (int block = lane_index(); block < p.detail.blocks; block += kLanes) {
    const float* sums = p.detail.of_block(block) + MixerSumsAt(p).batch_norm;
    of_bias += sums[c], of_weight += sums[branch + c];
  }
  for (int i = lane_index(); i < p.batch; i += kLanes) {
    const float grad = p.vectors[(int64_t(i) * 6 + 5) * branch + c];  // of the mean over a sample's pixels
    of_bias += grad;
    of_weight = fmaf(grad, (p.branch_mean[int64_t(i) * branch + c] - mean) * inverse, of_weight);
  }
  of_bias = sum_of_warp(of_bias), of_weight = sum_of_warp(of_weight);
  if (lane_index() == 0) p.grad.bn_weight[c] = of_weight, p.grad.bn_bias[c] = of_bias;
  const float factor = p.weights<W>(p.bn_weight)[c] * inverse, pixels = float(p.plane()), count = float(p.batch) * pixels;
  const float of_input = p.training ? -of_weight * factor * inverse / count : 0.0f;
  const float shared = p.training ? -of_bias / count : 0.0f;
  for (int i = lane_index(); i < p.batch; i += kLanes) {
    const float grad = p.vectors[(int64_t(i) * 6 + 5) * branch + c];
    float* to = p.batch_norm + int64_t(i) * 3 * branch + c;
    to[0] = factor, to[branch] = of_input;
    to[2 * branch] = factor * (grad / pixels + shared) - of_input * mean;
  }
}

}  // namespace mirage::cuda
