// Sums over the parts that blocks have left, and the softmax over the cosines of q and k.
#pragma once

#include "common/cuda/device.h"

namespace mirage::cuda {

// out[i] = the sum over the parts of partial[part][i] for i < count. Parts are `stride` apart. The order of the sum
// depends on their number alone. All threads of the block take part; `buffer`, in shared memory like `out`, has
// max(kThreads, count) floats. Teams of threads take a share of the parts each, so that no thread walks through all of
// them.
template <int kThreads>
MIRAGE_DEVICE void sum_parts(const float* partial, int parts, int64_t stride, int count, float* buffer, float* out) {
  const int width = count < kThreads ? (count + kLanes - 1) / kLanes * kLanes : kThreads, teams = kThreads / width;
  const int team = thread_index() / width, lane = thread_index() % width;
  for (int i = lane; i < count && team < teams; i += width) {
    float sum = 0.0f;
#pragma unroll 8
    for (int part = team; part < parts; part += teams) sum += partial[part * stride + i];
    buffer[teams > 1 ? team * width + i : i] = sum;
  }
  sync_block();
  for (int i = thread_index(); i < count; i += kThreads) {
    float sum = buffer[i];
    for (int other = 1; other < teams; ++other) sum += buffer[other * width + i];
    out[i] = sum;
  }
  sync_block();
}

constexpr float kNormFloor = 1e-12f;  // eps of torch.nn.functional.normalize

MIRAGE_DEVICE float floored(float norm) { return norm < kNormFloor ? kNormFloor : norm; }

// Turns a row in shared memory, the inner products of channel i of q with all channels of k, into the softmax over
// their cosines. One warp.
MIRAGE_DEVICE void softmax_row(float* row, float norm_q, const float* norm_k, float scale, int d) {
  float most = -INFINITY, total = 0.0f;
  for (int j = lane_index(); j < d; j += kLanes) {
    row[j] = row[j] / floored(norm_q) / floored(norm_k[j]);
    most = at_least(row[j] * scale, most);
  }
  most = warp_all_reduce_max(most);
  for (int j = lane_index(); j < d; j += kLanes) {
    row[j] = expf(fmaf(row[j], scale, -most));
    total += row[j];
  }
  total = warp_all_reduce_sum(total);
  for (int j = lane_index(); j < d; j += kLanes) row[j] /= total;
}

}  // namespace mirage::cuda
