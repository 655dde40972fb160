// Sums over the threads of a block, in an order that never changes.
#pragma once

#include "device.h"

namespace mirage::cuda {

// Sums of kCount values at once, over groups of kCount lanes, in kCount - 1 exchanges: that of value[i] to the lanes l
// with l % kCount = i. `value` is used up.
template <int kCount>
MIRAGE_DEVICE float sums_of_lanes(float* value) {
  if constexpr (kCount == 1) {
    return value[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane_index() & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? value[i] : value[i + kHalf];
      value[i] = (upper ? value[i + kHalf] : value[i]) + from_lane_xor(given, kHalf);
    }
    return sums_of_lanes<kHalf>(value);
  }
}

// Sums over the warps of a block, to each of them. `room`: [warps, kCount, lanes].
template <int kCount>
MIRAGE_DEVICE void sum_over_warps(float (&value)[kCount], int warps, float* room) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) room[(warp_index() * kCount + j) * kLanes + lane_index()] = value[j];
  sync_block();
#pragma unroll
  for (int j = 0; j < kCount; ++j) value[j] = 0.0f;
#pragma unroll 4
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) value[j] += room[(warp * kCount + j) * kLanes + lane_index()];
  }
}

// Of one value, to each warp; `room` is [warps, lanes].
MIRAGE_DEVICE float sum_over_warps(float x, int warps, float* room) {
  float value[1] = {x};
  sum_over_warps(value, warps, room);
  return value[0];
}

// Of all threads of a block, to each of them. `room`: a float a warp.
template <int kThreads>
MIRAGE_DEVICE float sum_of_block(float x, float* room) {
  x = sum_of_warp(x);
  sync_block();  // room may still be read
  if (lane_index() == 0) room[warp_index()] = x;
  sync_block();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kLanes; ++warp) sum += room[warp];
  return sum;
}

}  // namespace mirage::cuda
