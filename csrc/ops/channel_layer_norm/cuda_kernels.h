// The kernels of channel_layer_norm. The lanes of a warp have neighbouring pixels (two each if 16-bit pixels are
// aligned in pairs), and the warps of a block share the channels. Each warp holds its channels in registers, so that x
// is read once, and sums over channels go through shared memory. Channels that do not fit into a block's registers are
// read again.
#pragma once

#include "common/cuda/device.h"
#include "common/cuda/norm.h"
#include "common/cuda/sums.h"
#include "common/cuda/tensor_views.h"

namespace mirage::cuda {

constexpr int kNormOwn = 16;    // channels that a thread holds, at most
constexpr int kNormFew = 4;     // a thread skips groups of four channels that it does not have
constexpr int kNormWarps = 16;  // warps of a block, at most

struct LayerNormArguments {
  Planes x, grad_y;
  AnyVector weight, bias;
  void* y;             // y, contiguous; in backward the gradient of x
  float *mean, *rstd;  // [B, N]
  float* along;        // [2, B, N]: means over channels, which layer_norm_along_kernel computes for backward
  float* partial;      // [parts, 2, C]: sums for the gradients of weight and bias
  AnyVector grad_weight, grad_bias;
  float eps;
  int batch, channels, pixels;
  int warps;                  // of a block; each has every `warps`-th channel
  int64_t x_step, grad_step;  // elements from one channel of a warp to its next
  int slices, parts;          // in backward: slices of the channels, parts of the tiles of all samples

  template <class T>
  MIRAGE_DEVICE T* output(int sample, int n) const {
    return static_cast<T*>(y) + int64_t(sample) * channels * pixels + n;
  }
};

// The pixels of a lane: kPack from `first` on, if in_bounds.
struct NormPlace {
  int sample, first;
  bool in_bounds;
  int64_t in_statistics;
};

template <int kPack>
MIRAGE_ANYWHERE int64_t norm_tiles(const LayerNormArguments& p) {
  constexpr int kTile = kLanes * kPack;
  return p.batch * int64_t((p.pixels + kTile - 1) / kTile);
}

template <int kPack>
MIRAGE_DEVICE NormPlace place_of(const LayerNormArguments& p, int tile) {
  constexpr int kTile = kLanes * kPack;
  const int tiles = (p.pixels + kTile - 1) / kTile;
  const int sample = tile / tiles, first = tile % tiles * kTile + lane_index() * kPack;
  return {sample, first, first < p.pixels, int64_t(sample) * p.pixels + first};
}

// How many of the channels from `first` on belong to this warp.
MIRAGE_DEVICE int own_channels(const LayerNormArguments& p, int first) {
  const int own = (p.channels - first - warp_index() + p.warps - 1) / p.warps;
  return own < kNormOwn ? own : kNormOwn;
}

// Stores the elements of a vector for the channels from `first` on, those of a warp next to each other; zero beyond the
// last.
MIRAGE_DEVICE void store_own(const LayerNormArguments& p, const AnyVector& vector, int first, float* own) {
  for (int i = thread_index(); i < kNormOwn * p.warps; i += p.warps * kLanes) {
    const int c = first + i / kNormOwn + i % kNormOwn * p.warps;
    own[i] = c < p.channels ? vector[c] : 0.0f;
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

// One block per tile. Shared memory: weight, bias, and buffers for two reductions.
template <class TX, class TY, int kPack>
MIRAGE_KERNEL(512, 1) layer_norm_kernel(const LayerNormArguments p) {
  float *scale = reinterpret_cast<float*>(shared_memory()), *shift = scale + kNormOwn * p.warps,
        *buffer = shift + kNormOwn * p.warps;
  store_own(p, p.weight, 0, scale);
  store_own(p, p.bias, 0, shift);
  const NormPlace at = place_of<kPack>(p, int(block_index()));
  const int own = own_channels(p, 0);
  const TX* x = p.x.pixel<TX>(at.sample, at.first) + warp_index() * p.x.s_channel;
  Neighbours<TX, kPack> held[kNormOwn] = {};
#pragma unroll
  for (int i = 0; i < kNormOwn; ++i, x += p.x_step) {
    if (at.in_bounds && i < own) held[i] = load_neighbours<kPack>(x);
  }
  float mean[kPack] = {}, rest[kPack] = {}, rstd[kPack] = {};
#pragma unroll
  for (int i = 0; i < kNormOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) mean[j] += held[i][j];  // held is zero if there is no channel
  }
  sum_over_warps(mean, p.warps, buffer);
#pragma unroll
  for (int j = 0; j < kPack; ++j) mean[j] /= float(p.channels);
  // The last bits of the mean are a good part of the deviation where that is small beside it.
#pragma unroll
  for (int i = 0; i < kNormOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) rest[j] += i < own ? held[i][j] - mean[j] : 0.0f;
  }
  sum_over_warps(rest, p.warps, buffer + p.warps * kPack * kLanes);
#pragma unroll
  for (int j = 0; j < kPack; ++j) mean[j] += rest[j] / float(p.channels);
#pragma unroll
  for (int i = 0; i < kNormOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float centred = i < own ? held[i][j] - mean[j] : 0.0f;
      rstd[j] = fmaf(centred, centred, rstd[j]);
    }
  }
  sum_over_warps(rstd, p.warps, buffer);
#pragma unroll
  for (int j = 0; j < kPack; ++j) rstd[j] = 1.0f / sqrtf(rstd[j] / float(p.channels) + p.eps);
  if (!at.in_bounds) return;
  TY* y = p.output<TY>(at.sample, at.first) + int64_t(warp_index()) * p.pixels;
#pragma unroll
  for (int few = 0; few < kNormOwn; few += kNormFew) {
    if (few >= own) continue;
    float weight[kNormFew], bias[kNormFew];
    load_packed<kNormFew>(scale + warp_index() * kNormOwn + few, weight);
    load_packed<kNormFew>(shift + warp_index() * kNormOwn + few, bias);
#pragma unroll
    for (int i = few; i < few + kNormFew; ++i, y += int64_t(p.warps) * p.pixels) {
      float value[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        value[j] = fmaf((held[i][j] - mean[j]) * rstd[j], weight[i - few], bias[i - few]);
      }
      if (i < own) store_neighbours<kPack>(y, value);
    }
  }
  if (warp_index() == 0) {
    store_neighbours<kPack>(p.mean + at.in_statistics, mean);
    store_neighbours<kPack>(p.rstd + at.in_statistics, rstd);
  }
}

// The same for any number of channels. They are read three times, the second and third time from a cache if they fit.
template <class TX, class TY>
MIRAGE_KERNEL(512, 2) layer_norm_rereading_kernel(const LayerNormArguments p) {
  float* buffer = reinterpret_cast<float*>(shared_memory());
  const NormPlace at = place_of<1>(p, int(block_index()));
  const TX* x = p.x.pixel<TX>(at.sample, at.first);
  const int last = at.in_bounds ? p.channels : 0;
  float sum = 0.0f, rest = 0.0f, squares = 0.0f;
#pragma unroll 4
  for (int c = warp_index(); c < last; c += kNormWarps) sum += to_float(x[c * p.x.s_channel]);
  float mean = sum_over_warps(sum, kNormWarps, buffer) / float(p.channels);
#pragma unroll 4
  for (int c = warp_index(); c < last; c += kNormWarps) {
    const float centred = to_float(x[c * p.x.s_channel]) - mean;
    rest += centred;
    squares = fmaf(centred, centred, squares);
  }
  rest = sum_over_warps(rest, kNormWarps, buffer + kNormWarps * kLanes) / float(p.channels);
  squares = sum_over_warps(squares, kNormWarps, buffer) / float(p.channels);
  const float rstd = 1.0f / sqrtf(correct_mean(mean, rest, squares) + p.eps);
  TY* y = p.output<TY>(at.sample, at.first);
#pragma unroll 4
  for (int c = warp_index(); c < last; c += kNormWarps) {
    const float normal = (to_float(x[c * p.x.s_channel]) - mean) * rstd;
    y[int64_t(c) * p.pixels] = from_float<TY>(fmaf(normal, p.weight[c], p.bias[c]));
  }
  if (at.in_bounds && warp_index() == 0) {
    p.mean[at.in_statistics] = mean;
    p.rstd[at.in_statistics] = rstd;
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// With n the normalised x and g = grad_y * weight, the gradient of x is (g - mean(g) - n mean(g n)) rstd.

// Computes both means of each pixel, for more channels than a block can hold.
template <class TX, class TY>
MIRAGE_KERNEL(512, 2) layer_norm_along_kernel(const LayerNormArguments p) {
  const NormPlace at = place_of<1>(p, int(block_index()));
  const TX* x = p.x.pixel<TX>(at.sample, at.first);
  const TY* grad_y = p.grad_y.pixel<TY>(at.sample, at.first);
  const float mean = at.in_bounds ? p.mean[at.in_statistics] : 0.0f,
              rstd = at.in_bounds ? p.rstd[at.in_statistics] : 0.0f;
  const int last = at.in_bounds ? p.channels : 0;
  float sum[2] = {};
#pragma unroll 4
  for (int c = warp_index(); c < last; c += kNormWarps) {
    const float g = to_float(grad_y[c * p.grad_y.s_channel]) * p.weight[c];
    sum[0] += g;
    sum[1] = fmaf(g, (to_float(x[c * p.x.s_channel]) - mean) * rstd, sum[1]);
  }
  sum_over_warps(sum, kNormWarps, reinterpret_cast<float*>(shared_memory()));
  if (!at.in_bounds || warp_index() != 0) return;
  const int64_t all = int64_t(p.batch) * p.pixels;
#pragma unroll
  for (int j = 0; j < 2; ++j) p.along[j * all + at.in_statistics] = sum[j] / float(p.channels);
}

// What a thread holds of a tile in backward.
template <class TX, class TY, int kPack>
struct NormTile {
  Neighbours<TX, kPack> x[kNormOwn];
  Neighbours<TY, kPack> grad_y[kNormOwn];
  float mean[kPack], rstd[kPack];
  float along[2 * kPack];  // mean(g), mean(g n)

  MIRAGE_DEVICE float normal(int i, int j) const { return (x[i][j] - mean[j]) * rstd[j]; }
};

// Loads the thread's part of a tile; zero beyond the plane and beyond the channels.
template <class TX, class TY, int kPack>
MIRAGE_DEVICE void load_tile(const LayerNormArguments& p, const NormPlace& at, int channel, int own,
                             NormTile<TX, TY, kPack>& tile) {
  tile = {};
  const TX* x = p.x.pixel<TX>(at.sample, at.first) + channel * p.x.s_channel;
  const TY* grad_y = p.grad_y.pixel<TY>(at.sample, at.first) + channel * p.grad_y.s_channel;
#pragma unroll
  for (int i = 0; i < kNormOwn; ++i, x += p.x_step, grad_y += p.grad_step) {
    if (!at.in_bounds || i >= own) continue;
    tile.x[i] = load_neighbours<kPack>(x);
    tile.grad_y[i] = load_neighbours<kPack>(grad_y);
  }
  if (!at.in_bounds) return;
  load_packed<kPack>(p.mean + at.in_statistics, tile.mean);
  load_packed<kPack>(p.rstd + at.in_statistics, tile.rstd);
}

// Adds a tile to each channel's sums over pixels (for the weight, then for the bias), and computes the sums over
// channels.
template <class TX, class TY, int kPack>
MIRAGE_DEVICE void add_tile(const float* scale, int own, NormTile<TX, TY, kPack>& tile, float (&sums)[2 * kNormOwn]) {
#pragma unroll
  for (int few = 0; few < kNormOwn; few += kNormFew) {
    if (few >= own) continue;
    float weight[kNormFew];
    load_packed<kNormFew>(scale + few, weight);
#pragma unroll
    for (int i = few; i < few + kNormFew; ++i) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float grad = tile.grad_y[i][j], normal = tile.normal(i, j), g = grad * weight[i - few];
        sums[i] = fmaf(grad, normal, sums[i]);
        sums[kNormOwn + i] += grad;
        tile.along[j] += g;
        tile.along[kPack + j] = fmaf(g, normal, tile.along[kPack + j]);
      }
    }
  }
}

// Stores the gradient of x. `grad_x` points to this warp's first channel.
template <class TX, class TY, int kPack>
MIRAGE_DEVICE void store_grad_x(const LayerNormArguments& p, const float* scale, int own,
                                const NormTile<TX, TY, kPack>& tile, TX* grad_x) {
#pragma unroll
  for (int few = 0; few < kNormOwn; few += kNormFew) {
    if (few >= own) continue;
    float weight[kNormFew];
    load_packed<kNormFew>(scale + few, weight);
#pragma unroll
    for (int i = few; i < few + kNormFew; ++i, grad_x += int64_t(p.warps) * p.pixels) {
      float value[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float g = fmaf(tile.grad_y[i][j], weight[i - few], -tile.along[j]);
        value[j] = fmaf(-tile.normal(i, j), tile.along[kPack + j], g) * tile.rstd[j];
      }
      if (i < own) store_neighbours<kPack>(grad_x, value);
    }
  }
}

// A block has a part of the tiles: all channels, or if `kAll` is false up to 256 of them, with the means in p.along.
// Sums over pixels stay in registers until the part is done. Shared memory: the weights, and buffers for the sums of
// this tile and of the next.
template <class TX, class TY, int kPack, bool kAll>
MIRAGE_KERNEL(512) layer_norm_backward_kernel(const LayerNormArguments p) {
  static_assert(kAll || kPack == 1);
  float *scale = reinterpret_cast<float*>(shared_memory()), *buffer = scale + kNormOwn * p.warps;
  const int slice = int(block_index() % p.slices), part = int(block_index() / p.slices);
  const int first = slice * kNormOwn * p.warps, own = own_channels(p, first);
  store_own(p, p.weight, first, scale);
  sync_block();
  scale += warp_index() * kNormOwn;
  float sums[2 * kNormOwn] = {};
  const float inverse = 1.0f / float(p.channels);
  const int64_t tiles = norm_tiles<kPack>(p);
  const int last = int(tiles * (part + 1) / p.parts);
  for (int i = int(tiles * part / p.parts); i < last; ++i) {
    const NormPlace at = place_of<kPack>(p, i);
    NormTile<TX, TY, kPack> tile;
    load_tile(p, at, first + warp_index(), own, tile);
    add_tile(scale, own, tile, sums);
    if constexpr (kAll) {
      sum_over_warps(tile.along, p.warps, buffer + i % 2 * p.warps * 2 * kPack * kLanes);
#pragma unroll
      for (int j = 0; j < 2 * kPack; ++j) tile.along[j] *= inverse;
    } else if (at.in_bounds) {
      tile.along[0] = p.along[at.in_statistics];
      tile.along[1] = p.along[int64_t(p.batch) * p.pixels + at.in_statistics];
    }
    TX* grad_x = p.output<TX>(at.sample, at.first) + int64_t(first + warp_index()) * p.pixels;
    if (at.in_bounds) store_grad_x(p, scale, own, tile, grad_x);
  }
  const float sum = reduce_scatter_lanes<kLanes>(sums);
  const int i = lane_index() % kNormOwn, c = first + warp_index() + i * p.warps;
  if (i < own) p.partial[(int64_t(part) * 2 + lane_index() / kNormOwn) * p.channels + c] = sum;
}

// Adds up all parts. Each lane has a column of `partial`, each warp every 16th part.
MIRAGE_KERNEL(512) layer_norm_sum_kernel(const LayerNormArguments p) {
  const int64_t column = block_index() * kLanes + lane_index(), columns = 2 * int64_t(p.channels);
  float sum[1] = {};
  if (column < columns) {
#pragma unroll 4
    for (int part = warp_index(); part < p.parts; part += kNormWarps) sum[0] += p.partial[part * columns + column];
  }
  sum_over_warps(sum, kNormWarps, reinterpret_cast<float*>(shared_memory()));
  if (column >= columns || warp_index() != 0) return;
  if (column < p.channels) p.grad_weight.set(column, sum[0]);
  else p.grad_bias.set(column - p.channels, sum[0]);
}

}  // namespace mirage::cuda
