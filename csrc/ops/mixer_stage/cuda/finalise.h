// The second kernel of mixer_stage, on small data. Block 0 of a sample turns q k^T into the attention. The others
// generate 256 taps each of the 7x7 kernels, and recompute for that the few values that lead there. The blocks behind
// those of the samples pack weights.
#pragma once

#include "ops/channel_attention/cuda_softmax.h"
#include "pack.h"

namespace mirage::cuda {

// Computes the softmax over the cosines of q and k, and the statistics for backward: [heads, 2d + 2, d]. `buffer`: see
// finalise_floats.
template <class Kind, class W>
MIRAGE_DEVICE void finalise_attention(const MixerArguments& p, int sample, float* buffer) {
  const int branch = p.branch, depth = p.depth(), matrix = depth * depth, of_head = (2 * depth + 2) * depth;
  const int entries = p.means_at(), squares = p.squares_at();
  const float* partial = p.partial + int64_t(sample) * p.parts * p.partial_size();
  float* out = p.attention + int64_t(sample) * p.heads * of_head;
  float *sums = buffer, *norms = sums + squares;
  sum_parts<kTileThreads>(partial, p.parts, p.partial_size(), entries, buffer + entries, sums);
  for (int i = thread_index(); i < 2 * branch; i += kTileThreads) {
    norms[i] = sqrtf(norms[i]);
    const int which = i / branch, c = i % branch;
    out[c / depth * of_head + 2 * matrix + which * depth + c % depth] = norms[i];
  }
  for (int i = thread_index(); i < squares; i += kTileThreads)
    out[i / matrix * of_head + matrix + i % matrix] = sums[i];
  sync_block();
  const auto temperature = p.weights<W>(p.temperature);
  for (int i = warp_index(); i < branch; i += kTileWarps) {
    const int head = i / depth;
    softmax_row(sums + i * depth, norms[i], norms + branch + head * depth, temperature[head], depth);
  }
  sync_block();
  for (int i = thread_index(); i < squares; i += kTileThreads) out[i / matrix * of_head + i % matrix] = sums[i];
  pack_heads<Kind>(p, mixer_attention_steps<typename Kind::Element>(p, sample),
                   [&](int row, int column) { return sums[row * depth + column % depth]; });
}

// Floats of shared memory per block.
MIRAGE_ANYWHERE int finalise_floats(const MixerArguments& p) {
  const int entries = p.means_at();  // more than the kernel generator needs
  return entries + (entries > kTileThreads ? entries : kTileThreads);
}

struct Moments {
  float mean, deviations, count;
};

// Merges the moments of channel c of n2 over the parts from `first` on. One warp, each lane of which takes some of the
// parts. The mean is computed relative to that of the first part, so that a large offset is not rounded. Deviations are
// optional.
MIRAGE_DEVICE Moments merged_moments(const MixerArguments& p, int64_t first, int64_t parts, int c, bool deviations) {
  const float *partial = p.partial + first * p.partial_size(), base = partial[p.means_at() + c];
  Moments all{0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int64_t part = lane_index(); part < parts; part += kLanes) {
    const float* of_part = partial + part * p.partial_size();
    all.mean = fmaf(of_part[p.count_at()], of_part[p.means_at() + c] - base, all.mean);
    all.count += of_part[p.count_at()];
  }
  all.count = warp_all_reduce_sum(all.count);
  all.mean = base + warp_all_reduce_sum(all.mean) / all.count;
  if (!deviations) return all;
#pragma unroll 4
  for (int64_t part = lane_index(); part < parts; part += kLanes) {
    const float *of_part = partial + part * p.partial_size(), delta = of_part[p.means_at() + c] - all.mean;
    all.deviations += fmaf(of_part[p.count_at()] * delta, delta, of_part[p.means_at() + p.branch + c]);
  }
  all.deviations = warp_all_reduce_sum(all.deviations);
  return all;
}

// Calls store(i, matrix[i] . vector) for each row i of a matrix [branch, branch], one warp per row.
template <class W, class Store>
MIRAGE_DEVICE void multiply_vector(const W* matrix, const float* vector, int branch, Store store) {
  for (int i = warp_index(); i < branch; i += kTileWarps) {
    float sum = 0.0f;
    for (int k = lane_index(); k < branch; k += kLanes) sum = fmaf(to_float(matrix[i * branch + k]), vector[k], sum);
    sum = warp_all_reduce_sum(sum);
    if (lane_index() == 0) store(i, sum);
  }
}

template <class Kind, class W>
MIRAGE_DEVICE void generate_kernels(const MixerArguments& p, int sample, int slice, float* buffer) {
  const int branch = p.branch;
  float *average = buffer, *detail = buffer + branch, *hidden = detail + branch;
  const auto weight = p.weights<W>(p.bn_weight), bias = p.weights<W>(p.bn_bias);
  const auto running_mean = p.weights<W>(p.bn_mean), running_var = p.weights<W>(p.bn_var);
  for (int c = warp_index(); c < branch; c += kTileWarps) {
    float mean = 0.0f, variance = 0.0f;
    if (p.training) {
      const Moments all = merged_moments(p, 0, int64_t(p.batch) * p.parts, c, true);
      mean = all.mean, variance = all.deviations / all.count;
    } else {
      mean = running_mean[c], variance = running_var[c];
    }
    const float of_sample = merged_moments(p, int64_t(sample) * p.parts, p.parts, c, false).mean;
    if (lane_index() != 0) continue;
    average[c] = fmaf((of_sample - mean) * (1.0f / sqrtf(variance + p.bn_eps)), weight[c], bias[c]);
    if (slice != 0) continue;
    p.branch_mean[int64_t(sample) * branch + c] = of_sample;
    if (sample == 0) p.batch_mean[c] = mean, p.batch_var[c] = variance;
  }
  sync_block();
  // gic1 and the average over pixels are both linear, and may be swapped.
  const W* rows = static_cast<const W*>(p.gic1) + int64_t(2 * p.hidden - branch) * branch;
  multiply_vector(rows, average, branch, [&](int i, float sum) { detail[i] = sum; });
  sync_block();
  multiply_vector(static_cast<const W*>(p.generator_in), detail, branch,
                  [&](int i, float sum) { hidden[i] = gelu<float>(sum); });
  sync_block();
  const int i = slice * kTileThreads + thread_index();  // index of the tap
  if (i >= branch * kMixerTaps) return;
  const W* row = static_cast<const W*>(p.generator_out) + int64_t(i) * branch;
  float sum = 0.0f;
#pragma unroll 16
  for (int k = 0; k < branch; ++k) sum = fmaf(to_float(row[k]), hidden[k], sum);
  p.kernels[int64_t(sample) * branch * kMixerTaps + i] = sum;
  mixer_kernels<typename Kind::Element>(p, sample)[place_of_tap(i)] = sum;
}

// `blocks` per sample: one, and as many as its taps need. Two blocks per SM are requested, because by default the
// compiler limits itself to 64 registers, and spills.
template <class Kind, class W>
MIRAGE_KERNEL(256, 2) mixer_finalise_kernel(const MixerArguments p, const int blocks) {
  float* buffer = reinterpret_cast<float*>(shared_memory());
  const int sample = int(block_index() / blocks), slice = int(block_index() % blocks);
  const int step = int(block_index() - int64_t(p.batch) * blocks);  // of the weights; before them the floats
  if (step == 0) pack_floats<W>(p);
  else if (step > 0) pack_step<Kind, W>(p, step - 1);
  else if (slice == 0) finalise_attention<Kind, W>(p, sample, buffer);
  else generate_kernels<Kind, W>(p, sample, slice - 1, buffer);
}

}  // namespace mirage::cuda
