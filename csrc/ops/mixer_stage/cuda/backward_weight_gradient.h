// The last kernel of mixer_stage's backward: adds up the weight gradients that the blocks have left. It is no template,
// so only one source file may include this.
#pragma once

#include "common/cuda/sums.h"
#include "common/cuda/tiles.h"

namespace mirage::cuda {

// to[row, column] = the sum over `parts` of from[row, column], plus the sum over `samples` of left[row] right[column].
struct MixerSum {
  float* to = nullptr;
  int rows = 0, columns = 0, line_to = 0;
  const float* from = nullptr;
  int line = 0, parts = 0;
  int64_t stride = 0;  // between parts
  const float *left = nullptr, *right = nullptr;
  int samples = 0, left_stride = 0, right_stride = 0;
  bool is_temperature = false;  // divide by the gate's temperature, and negate
};

constexpr int kMixerSums = 19;

struct MixerSumList {
  MixerSum all[kMixerSums];
  const float* gate_temperature;
};

// Each block computes 32 elements of one of the sums, each warp every eighth part of them.
MIRAGE_KERNEL(256) mixer_weights_kernel(const MixerSumList list) {
  float* memory = reinterpret_cast<float*>(shared_memory());  // [warps, lanes]
  int64_t block = block_index();
  int which = 0;
  for (; which < kMixerSums - 1; ++which) {
    const int64_t blocks = (int64_t(list.all[which].rows) * list.all[which].columns + kLanes - 1) / kLanes;
    if (block < blocks) break;
    block -= blocks;
  }
  const MixerSum& p = list.all[which];
  const int64_t i = block * kLanes + lane_index();
  const bool exists = i < int64_t(p.rows) * p.columns;
  const int row = int(i / p.columns), column = int(i % p.columns);
  float sum = 0.0f;
  if (exists) {
    for (int part = warp_index(); part < p.parts; part += kTileWarps) {
      sum += p.from[part * p.stride + int64_t(row) * p.line + column];
    }
    for (int s = warp_index(); s < p.samples; s += kTileWarps) {
      sum = fmaf(p.left[int64_t(s) * p.left_stride + row], p.right[int64_t(s) * p.right_stride + column], sum);
    }
  }
  sum = sum_over_warps(sum, kTileWarps, memory);
  if (warp_index() != 0 || !exists) return;
  p.to[int64_t(row) * p.line_to + column] = p.is_temperature ? -sum / list.gate_temperature[0] : sum;
}

}  // namespace mirage::cuda
