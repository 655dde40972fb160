// The kernels of dynamic_depthwise_conv2d. A block holds a tile of 32 x 32 pixels of one plane with the kernel's halo
// in shared memory, as float, and each thread has four neighbours of a line.
#pragma once

#include "common/cuda/device.h"

namespace mirage::cuda {

struct DepthwiseArguments {
  const void *x, *weight;
  int64_t x_stride[4], weight_stride[4];
  const void* grad_y;  // read by the weight gradient
  int64_t grad_stride[4];
  void* y;         // y or the gradient of x, in x's shape; or the gradient of the weight
  float* partial;  // [parts, planes, K * K]
  bool flip;       // flip the kernel along both axes: the convolution of grad_y is then the gradient of x
  int channels, height, width;
  int64_t planes;
  int parts;  // of the tiles of a plane, in the weight gradient
};

constexpr int kDepthwiseThreads = 256;

template <int K>
struct DepthwiseTile {
  static constexpr int kSide = 32, kRun = 4, kRuns = kSide / kRun;
  static constexpr int kWindow = kSide + K - 1, kPitch = (kWindow + 3) / 4 * 4;
  static constexpr int kLoaded = (kRun + K - 1 + 3) / 4 * 4;  // floats of a line that a run loads
  static_assert(kDepthwiseThreads * kRun == kSide * kSide);

  // The loads of a run may reach beyond the last line.
  alignas(16) float window[kWindow * kPitch + 4];
  float taps[K * K];
};

MIRAGE_DEVICE int64_t plane_offset(const int64_t (&stride)[4], int channels, int64_t plane) {
  return plane / channels * stride[0] + plane % channels * stride[1];
}

// Loads the window of a tile; zero out of bounds.
template <class T, int K>
MIRAGE_DEVICE void load_window(const DepthwiseArguments& p, int64_t plane, int row, int column,
                               DepthwiseTile<K>& tile) {
  using Tile = DepthwiseTile<K>;
  const T* x = static_cast<const T*>(p.x) + plane_offset(p.x_stride, p.channels, plane);
  for (int i = thread_index(); i < Tile::kWindow * Tile::kPitch + 4; i += kDepthwiseThreads) {
    const int y = row + i / Tile::kPitch - K / 2, z = column + i % Tile::kPitch - K / 2;
    const bool in_bounds = i / Tile::kPitch < Tile::kWindow && y >= 0 && y < p.height && z >= 0 && z < p.width;
    tile.window[i] = in_bounds ? to_float(x[y * p.x_stride[2] + z * p.x_stride[3]]) : 0.0f;
  }
}

template <int K>
MIRAGE_DEVICE void load_run(const float* line, float (&value)[DepthwiseTile<K>::kLoaded]) {
#pragma unroll
  for (int j = 0; j < DepthwiseTile<K>::kLoaded; j += 4) load_packed<4>(line + j, value + j);
}

// One block per tile.
template <class T, int K>
MIRAGE_KERNEL(256) depthwise_kernel(const DepthwiseArguments p) {
  using Tile = DepthwiseTile<K>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int across = (p.width + Tile::kSide - 1) / Tile::kSide, down = (p.height + Tile::kSide - 1) / Tile::kSide;
  const int64_t plane = block_index() / (int64_t(across) * down);
  const int i = int(block_index() % (int64_t(across) * down));
  const int row = i / across * Tile::kSide, column = i % across * Tile::kSide;
  load_window<T, K>(p, plane, row, column, tile);
  const T* weight = static_cast<const T*>(p.weight) + plane_offset(p.weight_stride, p.channels, plane);
  for (int t = thread_index(); t < K * K; t += kDepthwiseThreads) {
    const int from = p.flip ? K * K - 1 - t : t;
    tile.taps[t] = to_float(weight[from / K * p.weight_stride[2] + from % K * p.weight_stride[3]]);
  }
  sync_block();
  const int line = thread_index() / Tile::kRuns, start = thread_index() % Tile::kRuns * Tile::kRun;
  float sum[Tile::kRun] = {};
#pragma unroll 1
  for (int y = 0; y < K; ++y) {
    float value[Tile::kLoaded];
    load_run<K>(tile.window + (line + y) * Tile::kPitch + start, value);
#pragma unroll
    for (int z = 0; z < K; ++z) {
      const float tap = tile.taps[y * K + z];
#pragma unroll
      for (int j = 0; j < Tile::kRun; ++j) sum[j] = fmaf(tap, value[z + j], sum[j]);
    }
  }
  if (row + line >= p.height) return;
  T* out = static_cast<T*>(p.y) + (plane * p.height + row + line) * p.width + column + start;
#pragma unroll
  for (int j = 0; j < Tile::kRun; ++j) {
    if (column + start + j < p.width) out[j] = from_float<T>(sum[j]);
  }
}

// Where a run of pixels lies: the plane's row and column that the kernel's first tap meets at the run's first pixel, and
// how many pixels of the run are in the plane.
struct RunPlace {
  int row, column, left;
};

// sum += grad_y times x for a run. Unless all taps of all pixels are `kInside` the plane, products with the padding are
// left out: what meets it may be infinite, and infinity times zero is NaN.
template <int K, bool kInside>
MIRAGE_DEVICE void add_products(const DepthwiseArguments& p, const DepthwiseTile<K>& tile, int line, int start,
                                const float (&of_y)[DepthwiseTile<K>::kRun], const RunPlace& place, float (&sum)[K * K]) {
  using Tile = DepthwiseTile<K>;
#pragma unroll
  for (int y = 0; y < K; ++y) {
    if (!kInside && (place.row + y < 0 || place.row + y >= p.height)) continue;
    float value[Tile::kLoaded];
    load_run<K>(tile.window + (line + y) * Tile::kPitch + start, value);
#pragma unroll
    for (int z = 0; z < K; ++z) {
#pragma unroll
      for (int j = 0; j < Tile::kRun; ++j) {
        const int column = place.column + z + j;
        if (!kInside && (j >= place.left || column < 0 || column >= p.width)) continue;
        sum[y * K + z] = fmaf(of_y[j], value[z + j], sum[y * K + z]);
      }
    }
  }
}

// One block per plane and part of its tiles: the sum over pixels of grad_y times x, for every tap. Each thread sums its
// own pixels; these sums are then reduced over the lanes of a warp, and over the warps.
template <class T, int K>
MIRAGE_KERNEL(256) depthwise_weight_kernel(const DepthwiseArguments p) {
  using Tile = DepthwiseTile<K>;
  constexpr int kWarps = kDepthwiseThreads / kLanes;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int across = (p.width + Tile::kSide - 1) / Tile::kSide, down = (p.height + Tile::kSide - 1) / Tile::kSide;
  const int64_t plane = block_index() / p.parts, tiles = int64_t(across) * down;
  const int part = int(block_index() % p.parts);
  const T* grad = static_cast<const T*>(p.grad_y) + plane_offset(p.grad_stride, p.channels, plane);
  const int line = thread_index() / Tile::kRuns, start = thread_index() % Tile::kRuns * Tile::kRun;
  float sum[K * K] = {};
  for (int64_t i = tiles * part / p.parts; i < tiles * (part + 1) / p.parts; ++i) {
    const int row = int(i / across) * Tile::kSide, column = int(i % across) * Tile::kSide;
    sync_block();  // the window has been read
    load_window<T, K>(p, plane, row, column, tile);
    float of_y[Tile::kRun];
#pragma unroll
    for (int j = 0; j < Tile::kRun; ++j) {
      const bool in_bounds = row + line < p.height && column + start + j < p.width;
      const int64_t offset = (row + line) * p.grad_stride[2] + (column + start + j) * p.grad_stride[3];
      of_y[j] = in_bounds ? to_float(grad[offset]) : 0.0f;
    }
    sync_block();
    const int left = row + line < p.height ? p.width - column - start : 0;
    const RunPlace place{row + line - K / 2, column + start - K / 2, left};
    const bool inside = place.row >= 0 && place.row + K <= p.height && place.column >= 0 &&
                        place.column + Tile::kRun + K - 1 <= p.width;
    if (inside) add_products<K, true>(p, tile, line, start, of_y, place, sum);
    else if (left > 0) add_products<K, false>(p, tile, line, start, of_y, place, sum);
  }
  sync_block();
  float* of_warps = tile.window;  // [warps, K * K]
  static_assert(kWarps * K * K <= Tile::kWindow * Tile::kPitch);
#pragma unroll
  for (int t = 0; t < K * K; ++t) {
    const float total = warp_all_reduce_sum(sum[t]);
    if (lane_index() == 0) of_warps[warp_index() * K * K + t] = total;
  }
  sync_block();
  for (int t = thread_index(); t < K * K; t += kDepthwiseThreads) {
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) total += of_warps[warp * K * K + t];
    p.partial[(part * p.planes + plane) * K * K + t] = total;
  }
}

// Adds up the parts in their order, one thread per element of the gradient, which has `size`.
template <class T>
MIRAGE_KERNEL(256) depthwise_sum_kernel(const DepthwiseArguments p, const int64_t size) {
  const int64_t i = block_index() * 256 + thread_index();
  if (i >= size) return;
  float sum = 0.0f;
  for (int part = 0; part < p.parts; ++part) sum += p.partial[part * size + i];
  static_cast<T*>(p.y)[i] = from_float<T>(sum);
}

}  // namespace mirage::cuda
