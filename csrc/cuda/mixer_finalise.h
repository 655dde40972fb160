// The second kernel of mixer_stage, on numbers that are few: block 0 of a sample turns q k^T into the attention, the others
// generate 256 taps each of the 7x7 kernels, after finding again the little that leads there.
#pragma once

#include "mixer_stage.h"

namespace mirage::cuda {

// Softmax over the cosines of q and k, and what backward wants of them: [heads, 2d + 2, d].
template <class W>
MIRAGE_DEVICE void finalise_attention(const MixerArguments& p, int sample, float* sums) {
  const int branch = p.branch, depth = p.depth(), entries = p.means_at();
  const float* partial = p.partial + int64_t(sample) * p.parts * p.partial_size();
  float* out = p.attention + int64_t(sample) * p.heads * (2 * depth + 2) * depth;
  const auto temperature = p.weights<W>(p.temperature);
  for (int i = thread_index(); i < entries; i += kTileThreads) {
    float sum = 0.0f;
    for (int part = 0; part < p.parts; ++part) sum += partial[int64_t(part) * p.partial_size() + i];
    sums[i] = i < p.squares_at() ? sum : sqrtf(sum);
  }
  sync_block();
  for (int i = thread_index(); i < branch; i += kTileThreads) {
    const int head = i / depth;
    const float* gram = sums + i * depth;
    const float *norm_q = sums + p.squares_at(), *norm_k = norm_q + branch + head * depth;
    float* of_head = out + int64_t(head) * (2 * depth + 2) * depth;
    float* softmax = of_head + i % depth * depth;
    const float scale = temperature[head], norm = norm_q[i] < 1e-12f ? 1e-12f : norm_q[i];
    float most = -INFINITY, total = 0.0f;
    for (int j = 0; j < depth; ++j) {
      const float score = gram[j] / norm / (norm_k[j] < 1e-12f ? 1e-12f : norm_k[j]) * scale;
      softmax[j] = score;
      most = at_least(most, score);
    }
    for (int j = 0; j < depth; ++j) {
      softmax[j] = expf(softmax[j] - most);
      total += softmax[j];
    }
    for (int j = 0; j < depth; ++j) softmax[j] /= total;
    for (int j = 0; j < depth; ++j) of_head[(depth + i % depth) * depth + j] = gram[j];
    of_head[2 * depth * depth + i % depth] = norm_q[i];
    of_head[(2 * depth + 1) * depth + i % depth] = norm_k[i % depth];
  }
}

struct Moments {
  float count, mean, deviations;
};

// Of channel c of n2, over the parts from `first` on, in their order.
MIRAGE_DEVICE Moments merged_moments(const MixerArguments& p, int64_t first, int64_t parts, int c) {
  Moments all{0.0f, 0.0f, 0.0f};
  for (int64_t part = first; part < first + parts; ++part) {
    const float* partial = p.partial + part * p.partial_size();
    const float count = partial[p.count_at()], mean = partial[p.means_at() + c];
    const float total = all.count + count, delta = mean - all.mean;
    all.mean += delta * (count / total);
    all.deviations += partial[p.means_at() + p.branch + c] + delta * delta * (all.count * count / total);
    all.count = total;
  }
  return all;
}

// out[i] = the product of row i of a matrix [rows, branch] and `vector`, a thread a row.
template <class W, class Change>
MIRAGE_DEVICE void multiply_vector(const W* matrix, const float* vector, int branch, int first, int last, Change store) {
  for (int i = first + thread_index(); i < last; i += kTileThreads) {
    const W* row = matrix + int64_t(i) * branch;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < branch; ++k) sum = fmaf(to_float(row[k]), vector[k], sum);
    store(i, sum);
  }
}

template <class W>
MIRAGE_DEVICE void generate_kernels(const MixerArguments& p, int sample, int slice, float* room) {
  const int branch = p.branch;
  float *average = room, *detail = room + branch, *hidden = detail + branch;
  const auto weight = p.weights<W>(p.bn_weight), bias = p.weights<W>(p.bn_bias);
  const auto running_mean = p.weights<W>(p.bn_mean), running_var = p.weights<W>(p.bn_var);
  for (int c = thread_index(); c < branch; c += kTileThreads) {
    float mean = 0.0f, variance = 0.0f;
    if (p.training) {
      const Moments all = merged_moments(p, 0, int64_t(p.batch) * p.parts, c);
      mean = all.mean, variance = all.deviations / all.count;
    } else {
      mean = running_mean[c], variance = running_var[c];
    }
    const float of_sample = merged_moments(p, int64_t(sample) * p.parts, p.parts, c).mean;
    average[c] = fmaf((of_sample - mean) * (1.0f / sqrtf(variance + p.bn_eps)), weight[c], bias[c]);
    if (slice != 0) continue;
    p.branch_mean[int64_t(sample) * branch + c] = of_sample;
    if (sample == 0) p.batch_mean[c] = mean, p.batch_var[c] = variance;
  }
  sync_block();
  // gic1 and the average over pixels change places: both are linear.
  const W* rows = static_cast<const W*>(p.gic1) + int64_t(2 * p.hidden - branch) * branch;
  multiply_vector(rows, average, branch, 0, branch, [&](int i, float sum) { detail[i] = sum; });
  sync_block();
  const W* in = static_cast<const W*>(p.generator_in);
  multiply_vector(in, detail, branch, 0, branch, [&](int i, float sum) { hidden[i] = gelu<float>(sum); });
  sync_block();
  float* kernels = p.kernels + int64_t(sample) * branch * kMixerTaps;
  const int first = slice * kTileThreads, end = branch * kMixerTaps;
  multiply_vector(static_cast<const W*>(p.generator_out), hidden, branch, first,
                  first + kTileThreads < end ? first + kTileThreads : end,
                  [&](int i, float sum) { kernels[i] = sum; });
}

// `blocks` of a sample: one, and as many as its taps want.
template <class W>
MIRAGE_KERNEL(256) mixer_finalise_kernel(const MixerArguments p, const int blocks) {
  float* room = reinterpret_cast<float*>(shared_memory());
  const int sample = int(block_index() / blocks), slice = int(block_index() % blocks);
  if (slice == 0) finalise_attention<W>(p, sample, room);
  else generate_kernels<W>(p, sample, slice - 1, room);
}

}  // namespace mirage::cuda
