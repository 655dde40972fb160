// Reductions over the threads of a block, always in the same order, so that results are reproducible to the bit.
#pragma once

#include "device.h"

namespace mirage::cuda {

// Reduce-scatter of kCount values within groups of kCount lanes, in kCount - 1 shuffles: a lane gets the sum of
// value[lane % kCount]. Overwrites `value`.
template <int kCount>
MIRAGE_DEVICE float reduce_scatter_lanes(float* value) {
  if constexpr (kCount == 1) {
    return value[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane_index() & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? value[i] : value[i + kHalf];
      value[i] = (upper ? value[i + kHalf] : value[i]) + shfl_xor(given, kHalf);
    }
    return reduce_scatter_lanes<kHalf>(value);
  }
}

// Adds up the values of equal lanes of all warps; every warp gets the sums. `buffer`: [warps, kCount, lanes].
template <int kCount>
MIRAGE_DEVICE void sum_over_warps(float (&value)[kCount], int warps, float* buffer) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) buffer[(warp_index() * kCount + j) * kLanes + lane_index()] = value[j];
  sync_block();
#pragma unroll
  for (int j = 0; j < kCount; ++j) value[j] = 0.0f;
#pragma unroll 4
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) value[j] += buffer[(warp * kCount + j) * kLanes + lane_index()];
  }
}

// The same for one value. `buffer`: [warps, lanes].
MIRAGE_DEVICE float sum_over_warps(float x, int warps, float* buffer) {
  float value[1] = {x};
  sum_over_warps(value, warps, buffer);
  return value[0];
}

// Block all-reduce: every thread gets the total. `buffer`: one float per warp.
template <int kThreads>
MIRAGE_DEVICE float block_all_reduce_sum(float x, float* buffer) {
  x = warp_all_reduce_sum(x);
  sync_block();  // the buffer may still be being read
  if (lane_index() == 0) buffer[warp_index()] = x;
  sync_block();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kLanes; ++warp) sum += buffer[warp];
  return sum;
}

}  // namespace mirage::cuda
