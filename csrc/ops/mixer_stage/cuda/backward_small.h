// The small kernels of mixer_stage's backward: the preparation for the kernels over tiles, and after them the gradients
// of the kernel generator and of BatchNorm's statistics.
#pragma once

#include "backward_pack.h"
#include "finalise.h"

namespace mirage::cuda {

// ---- before the tiles ----------------------------------------------------------------------------------------------

// Stores the layer norm's moments of each pixel of the batch, one thread per pixel.
template <class T>
MIRAGE_DEVICE void store_moments(const MixerArguments& p, int64_t block) {
  const int64_t i = block * kTileThreads + thread_index(), plane = p.plane();
  if (i >= p.batch * plane) return;
  const int64_t sample = i / plane, n = i % plane;
  const T* pixel = static_cast<const T*>(p.x) + sample * p.s_batch + n / p.width * p.s_row + n % p.width * p.s_column;
  p.moments[i] = norm_moments(pixel, p.s_channel, 3 * p.branch, p.eps);
}

// Packs a sample's attention, also transposed, and its generated kernels, from the statistics that forward has kept.
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

// One block for what is in no step, one for each step of the weights, one for each sample, and the rest for the
// moments.
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
  store_moments<T>(p, i - p.batch);
}

// ---- after the tiles -----------------------------------------------------------------------------------------------

// Calls store(i, matrix[:, i] . vector) for each column i of a matrix [rows, branch]. A warp has 32 columns and every
// eighth row. `buffer`: [warps, lanes].
template <class W, class Store>
MIRAGE_DEVICE void multiply_transposed(const W* matrix, const float* vector, int rows, int branch, float* buffer,
                                       Store store) {
  for (int first = 0; first < branch; first += kLanes) {
    const int i = first + lane_index();
    float sum[1] = {};
#pragma unroll 8
    for (int row = warp_index(); row < rows; row += kTileWarps) {
      if (i < branch) sum[0] = fmaf(to_float(matrix[int64_t(row) * branch + i]), vector[row], sum[0]);
    }
    sync_block();  // the buffer may still be being read
    sum_over_warps(sum, kTileWarps, buffer);
    if (warp_index() == 0 && i < branch) store(i, sum[0]);
  }
  sync_block();
}

MIRAGE_ANYWHERE int generator_floats(const MixerArguments& p) {
  const int taps = p.branch * kMixerTaps;
  return taps + (taps > kTileThreads ? taps : kTileThreads) + 7 * p.branch;
}

// Backward of the kernel generator, one block per sample. Writes the gradients of the generated kernels to grad_kernels
// [B, c, 49], and to `vectors` [B, 6, c] the inputs of gic1's detail rows, generator_in and generator_out, then the
// gradients of the outputs of generator_in and gic1, and of the input of gic1.
template <class W>
MIRAGE_KERNEL(256) mixer_generator_backward_kernel(const MixerBackwardArguments p, const int tiles_of_sample) {
  const int branch = p.branch, taps = branch * kMixerTaps, sample = int(block_index());
  float *grad = reinterpret_cast<float*>(shared_memory()), *buffer = grad + taps;
  float* vector = buffer + (taps > kTileThreads ? taps : kTileThreads);  // [7, c], the last one before its GELU
  const PartsOfSample parts(p.detail, p.batch, tiles_of_sample, sample);
  sum_parts<kTileThreads>(parts.first, parts.count, parts.stride, taps, buffer, grad);
  for (int i = thread_index(); i < taps; i += kTileThreads) p.grad_kernels[int64_t(sample) * taps + i] = grad[i];
  const MixerBatchNorm batch_norm(p);
  for (int c = thread_index(); c < branch; c += kTileThreads) {
    vector[c] = batch_norm(c)(p.branch_mean[int64_t(sample) * branch + c]);
  }
  sync_block();
  const W* rows = static_cast<const W*>(p.gic1) + int64_t(2 * p.hidden - branch) * branch;
  const W *first = static_cast<const W*>(p.generator_in), *second = static_cast<const W*>(p.generator_out);
  float *grad_second = vector + 3 * branch, *grad_first = grad_second + branch, *grad_input = grad_first + branch;
  multiply_vector(rows, vector, branch, [&](int i, float sum) { vector[branch + i] = sum; });
  sync_block();
  multiply_vector(first, vector + branch, branch, [&](int i, float sum) {
    vector[2 * branch + i] = gelu<float>(sum), vector[6 * branch + i] = sum;
  });
  sync_block();
  multiply_transposed(second, grad, taps, branch, buffer, [&](int i, float sum) {
    float slope;
    gelu_with_slope<float>(vector[6 * branch + i], slope);
    grad_second[i] = sum * slope;
  });
  multiply_transposed(first, grad_second, branch, branch, buffer, [&](int i, float sum) { grad_first[i] = sum; });
  multiply_transposed(rows, grad_first, branch, branch, buffer, [&](int i, float sum) { grad_input[i] = sum; });
  for (int i = thread_index(); i < 6 * branch; i += kTileThreads) {
    p.vectors[int64_t(sample) * 6 * branch + i] = vector[i];
  }
}

// BatchNorm's backward, one warp per channel: the gradients of weight and bias; and `batch_norm` [B, 3, c], from which
// the gradient of its input follows: the factors of the output's gradient and of the input, and an addend.
template <class W>
MIRAGE_KERNEL(256) mixer_batch_norm_backward_kernel(const MixerBackwardArguments p) {
  const int branch = p.branch, c = int(block_index()) * kTileWarps + warp_index();
  if (c >= branch) return;
  const float mean = p.batch_mean[c], inverse = 1.0f / sqrtf(p.batch_var[c] + p.bn_eps);
  float grad_bias = 0.0f, grad_weight = 0.0f;
  for (int block = lane_index(); block < p.detail.blocks; block += kLanes) {
    const float* sums = p.detail.of_block(block) + MixerSumsAt(p).batch_norm;
    grad_bias += sums[c], grad_weight += sums[branch + c];
  }
  for (int i = lane_index(); i < p.batch; i += kLanes) {
    const float grad = p.vectors[(int64_t(i) * 6 + 5) * branch + c];  // gradient of the mean over a sample's pixels
    grad_bias += grad;
    grad_weight = fmaf(grad, (p.branch_mean[int64_t(i) * branch + c] - mean) * inverse, grad_weight);
  }
  grad_bias = warp_all_reduce_sum(grad_bias), grad_weight = warp_all_reduce_sum(grad_weight);
  if (lane_index() == 0) p.grad.bn_weight[c] = grad_weight, p.grad.bn_bias[c] = grad_bias;
  const float factor = p.weights<W>(p.bn_weight)[c] * inverse, pixels = float(p.plane()),
              count = float(p.batch) * pixels;
  const float grad_input = p.training ? -grad_weight * factor * inverse / count : 0.0f;
  const float shared = p.training ? -grad_bias / count : 0.0f;
  for (int i = lane_index(); i < p.batch; i += kLanes) {
    const float grad = p.vectors[(int64_t(i) * 6 + 5) * branch + c];
    float* to = p.batch_norm + int64_t(i) * 3 * branch + c;
    to[0] = factor, to[branch] = grad_input;
    to[2 * branch] = factor * (grad / pixels + shared) - grad_input * mean;
  }
}

}  // namespace mirage::cuda
