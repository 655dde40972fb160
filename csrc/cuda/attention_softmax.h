// Sums of parts, and the softmax over the cosines of q and k.
#pragma once

#include "device.h"

namespace mirage::cuda {

// out[i] = the sum over the parts of partial[part][i], in an order that depends on nothing but their number, for i < count;
// parts lie `stride` apart. All threads of a block together; `room` in shared memory has max(kThreads, count) floats, out and
// it are shared. Several threads have a part of the parts each, so that none walks through all of them.
template <int kThreads>
MIRAGE_DEVICE void sum_parts(const float* partial, int parts, int64_t stride, int count, float* room, float* out) {
  const int width = count < kThreads ? (count + kLanes - 1) / kLanes * kLanes : kThreads, teams = kThreads / width;
  const int team = thread_index() / width, lane = thread_index() % width;
  for (int i = lane; i < count && team < teams; i += width) {
    float sum = 0.0f;
#pragma unroll 8
    for (int part = team; part < parts; part += teams) sum += partial[part * stride + i];
    room[teams > 1 ? team * width + i : i] = sum;
  }
  sync_block();
  for (int i = thread_index(); i < count; i += kThreads) {
    float sum = room[i];
    for (int other = 1; other < teams; ++other) sum += room[other * width + i];
    out[i] = sum;
  }
  sync_block();
}

constexpr float kNormFloor = 1e-12f;  // of torch.nn.functional.normalize

MIRAGE_DEVICE float floored(float norm) { return norm < kNormFloor ? kNormFloor : norm; }

// One row of attn [d, d]: the softmax over the cosines of channel i of q with those of k, from inner products and norms.
MIRAGE_DEVICE void softmax_row(const float* gram, float norm_q, const float* norm_k, float scale, int d, float* out) {
  float most = -INFINITY, total = 0.0f;
  for (int j = 0; j < d; ++j) {
    const float score = gram[j] / floored(norm_q) / floored(norm_k[j]) * scale;
    out[j] = score;
    most = at_least(most, score);
  }
  for (int j = 0; j < d; ++j) {
    out[j] = expf(out[j] - most);
    total += out[j];
  }
  for (int j = 0; j < d; ++j) out[j] /= total;
}

}  // namespace mirage::cuda
