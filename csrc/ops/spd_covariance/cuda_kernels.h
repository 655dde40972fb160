// The kernels of spd_covariance.
//
//   covariance_part      each block has a part of the pixels and a pair of tiles of channels. It centres 256 pixels at
//                        a time by their own means, and multiplies them while they are in shared memory
//   covariance_merge     merges the parts of a sample
//   covariance_backward  (G + G^T) (X - mu) / (N - 1)
//
// Merging follows Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
// 1979. A mean is stored as two numbers, the rounded mean of a part's first pixels and the difference to it, so that a
// large common offset causes no rounding.
#pragma once

#include "common/cuda/device.h"
#include "common/cuda/gemm.h"
#include "common/cuda/sums.h"
#include "common/cuda/tensor_views.h"

namespace mirage::cuda {

constexpr int kCovarianceThreads = 256, kCovarianceWarps = kCovarianceThreads / kLanes;
constexpr int kCovariancePixels = 256;                                  // pixels of a chunk
constexpr int kCovarianceRun = kCovariancePixels / kLanes;              // pixels of a chunk per lane
constexpr int kCovarianceShare = kCovariancePixels / kCovarianceWarps;  // pixels of a chunk per warp, in products
constexpr int kMergeWarps = 16;

struct CovarianceArguments {
  Planes x;
  int64_t x_step;      // elements between channels of a warp, which has every eighth
  const void* grad_y;  // [B, C, C]
  int64_t grad_stride[3];
  void* y;             // [B, C, C]; in backward the gradient of x, contiguous
  float* mean;         // [B, 2, C]
  float* products;     // [B, parts, pairs of tiles, kSide * kSide], as fragments
  float* means;        // [B, parts, 2, C]: origin, and the mean above it
  float eps;
  int batch, channels, pixels;
  int tiles;               // of kSide channels
  int parts, part_pixels;  // of a sample; the last part may be smaller

  MIRAGE_ANYWHERE int pairs() const { return tiles * (tiles + 1) / 2; }
  MIRAGE_DEVICE int pixels_of_part(int part) const {
    const int left = pixels - part * part_pixels;
    return left < part_pixels ? left : part_pixels;
  }
};

// A pair of tiles of channels, `row` <= `column`.
struct TilePair {
  int row, column;
};

MIRAGE_DEVICE TilePair tile_pair(int tiles, int pair) {
  int row = 0;
  while (pair >= tiles - row) pair -= tiles - row++;
  return {row, row + pair};
}

// Squares lie in memory fragment by fragment, 16 x 8 elements each. The position of element `n`, which is in lane n %
// 32.
struct InSquare {
  int row, column;
};

template <int kSide>
MIRAGE_DEVICE InSquare in_square(int n) {
  const int lane = n % kLanes, i = n / kLanes % 4, block = n / (4 * kLanes);
  return {block / (kSide / 8) * 16 + lane / 4 + i / 2 * 8, block % (kSide / 8) * 8 + lane % 4 * 2 + i % 2};
}

// ---- the moments of a part -----------------------------------------------------------------------------------------

// kSide channels of a chunk of pixels.
template <int kSide>
struct CovarianceTile {
  static constexpr int kPitch = kCovariancePixels + 4;  // rows of a fragment start in different banks

  alignas(16) float centred[kSide * kPitch];
  float origin[kSide];  // the first chunk's mean, rounded
  float mean[kSide];    // of the part so far, relative to the origin
  float step[kSide];    // chunk mean minus the mean of earlier chunks
  float rest[kSide];    // sum of the centred values, not zero because their mean is rounded
};

struct CovarianceChunk {
  int sample, begin;
  float before, count;  // pixels of the part in earlier chunks, and in this one
};

// Loads the chunk of kSide channels from `first` on and subtracts their means. Zero beyond the pixels and channels.
template <class T, int kSide>
MIRAGE_DEVICE void centre_chunk(const CovarianceArguments& p, const CovarianceChunk& chunk, int first,
                                CovarianceTile<kSide>& tile) {
  constexpr int kRows = kSide / kCovarianceWarps;  // rows per warp
  float value[kRows][kCovarianceRun] = {}, sum[kRows] = {}, rest[kRows] = {};
  PixelWalk<T> pixel(p.x, p.x.pixel<T>(chunk.sample, 0) + (first + warp_index()) * p.x.s_channel,
                     chunk.begin + lane_index());
#pragma unroll
  for (int j = 0; j < kCovarianceRun; ++j, pixel.advance()) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool in_bounds = pixel.n < p.pixels && first + warp_index() + i * kCovarianceWarps < p.channels;
      if (in_bounds) value[i][j] = to_float(pixel.at[i * p.x_step]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kCovarianceRun; ++j) sum[i] += value[i][j];
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = warp_index() + i * kCovarianceWarps;
    const float shift = warp_all_reduce_sum(sum[i]) / chunk.count;
#pragma unroll
    for (int j = 0; j < kCovarianceRun; ++j) {
      const int n = kLanes * j + lane_index();
      const float centred = chunk.begin + n < p.pixels ? value[i][j] - shift : 0.0f;
      tile.centred[row * CovarianceTile<kSide>::kPitch + n] = centred;
      rest[i] += centred;
    }
    rest[i] = warp_all_reduce_sum(rest[i]);
    if (lane_index() != 0) continue;
    if (chunk.before == 0.0f) tile.origin[row] = shift;
    const float mean = chunk.before > 0.0f ? tile.mean[row] : 0.0f;
    const float step = ((shift - tile.origin[row]) - mean) + rest[i] / chunk.count;
    tile.mean[row] = fmaf(step, chunk.count / (chunk.before + chunk.count), mean);
    tile.step[row] = step;
    tile.rest[row] = rest[i];
  }
}

// acc += left right^T over the pixels of a warp. Rows of both are kPitch apart.
template <int kPitch, int MT, int NT>
MIRAGE_DEVICE void multiply_share(TensorCoresTf32, const float* left, const float* right, float (&acc)[MT][NT][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int n = t; n < kCovarianceShare; n += 8) {
    uint32_t b[NT][2];
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      b[j][0] = to_tf32(right[(8 * j + g) * kPitch + n]);
      b[j][1] = to_tf32(right[(8 * j + g) * kPitch + n + 4]);
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const float* row = left + (16 * m + g) * kPitch + n;
      const uint32_t a[4] = {to_tf32(row[0]), to_tf32(row[8 * kPitch]), to_tf32(row[4]), to_tf32(row[8 * kPitch + 4])};
#pragma unroll
      for (int j = 0; j < NT; ++j) multiply_add<float>(acc[m][j], a, b[j]);
    }
  }
}

template <int kPitch, int MT, int NT>
MIRAGE_DEVICE void multiply_share(ExactFloat, const float* left, const float* right, float (&acc)[MT][NT][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int n = 0; n < kCovarianceShare; n += 4) {
    float a[2 * MT][4];
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) load_packed<4>(left + (8 * i + g) * kPitch + n, a[i]);
#pragma unroll
    for (int j = 0; j < 2 * NT; ++j) {
      float b[4];
      load_packed<4>(right + (j / 2 * 8 + 2 * t + j % 2) * kPitch + n, b);
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i) {
        float& sum = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
#pragma unroll
        for (int k = 0; k < 4; ++k) sum = fmaf(a[i][k], b[k], sum);
      }
    }
  }
}

// Adds what the products of a chunk about its own means leave out: the difference of its means to those of earlier
// chunks, and the rounding of its means.
template <int kSide>
MIRAGE_DEVICE void add_step(const CovarianceChunk& chunk, const CovarianceTile<kSide>& rows,
                            const CovarianceTile<kSide>& columns, float (&acc)[kSide / 16][kSide / 8][4]) {
  const float weight = chunk.before * (chunk.count / (chunk.before + chunk.count)), share = 1.0f / chunk.count;
#pragma unroll
  for (int j = 0; j < kSide / 4; ++j) {
    const int column = in_square<kSide>(kLanes * (j / 2 * 4 + j % 2) + lane_index()).column;
    const float step = columns.step[column] * weight, rest = columns.rest[column] * share;
#pragma unroll
    for (int i = 0; i < kSide / 8; ++i) {
      const int row = 8 * i + lane_index() / 4;
      float& sum = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
      sum += fmaf(rows.step[row], step, -(rows.rest[row] * rest));
    }
  }
}

// Adds up the accumulators of all warps and stores the square. `buffer` holds the squares of all warps.
template <int kSide>
MIRAGE_DEVICE void store_square(const float (&acc)[kSide / 16][kSide / 8][4], float* buffer, float* out) {
  constexpr int kSquare = kSide * kSide;
#pragma unroll
  for (int i = 0; i < kSquare / kLanes; ++i) {
    const float value = acc[i / 4 / (kSide / 8)][i / 4 % (kSide / 8)][i % 4];
    buffer[warp_index() * kSquare + i * kLanes + lane_index()] = value;
  }
  sync_block();
  for (int n = thread_index(); n < kSquare; n += kCovarianceThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kCovarianceWarps; ++warp) sum += buffer[warp * kSquare + n];
    out[n] = sum;
  }
}

template <class Kind, class T, int kSide>
MIRAGE_KERNEL(256, 2) covariance_part_kernel(const CovarianceArguments p) {
  using Tile = CovarianceTile<kSide>;
  static_assert(kCovarianceWarps * kSide <= Tile::kPitch);
  Tile* tiles = reinterpret_cast<Tile*>(shared_memory());
  const int i_pair = int(block_index() % p.pairs()), part = int(block_index() / p.pairs() % p.parts);
  const int64_t i_part = block_index() / p.pairs();
  const int sample = int(i_part / p.parts), count = p.pixels_of_part(part);
  const TilePair pair = tile_pair(p.tiles, i_pair);
  const bool diagonal = pair.row == pair.column;
  Tile &rows = tiles[0], &columns = tiles[diagonal ? 0 : 1];
  float acc[kSide / 16][kSide / 8][4] = {};
  for (int done = 0; done < count; done += kCovariancePixels) {
    const int left = count - done;
    const CovarianceChunk chunk{sample, part * p.part_pixels + done, float(done),
                      float(left < kCovariancePixels ? left : kCovariancePixels)};
    sync_block();  // the previous chunk has been multiplied
    centre_chunk<T>(p, chunk, pair.row * kSide, rows);
    if (!diagonal) centre_chunk<T>(p, chunk, pair.column * kSide, columns);
    sync_block();
    const int first = warp_index() * kCovarianceShare;
    multiply_share<Tile::kPitch>(Kind(), rows.centred + first, columns.centred + first, acc);
    if (done / kCovariancePixels % kCovarianceWarps == warp_index()) add_step(chunk, rows, columns, acc);
  }
  sync_block();
  store_square<kSide>(acc, rows.centred, p.products + int64_t(block_index()) * kSide * kSide);
  const int i = thread_index(), c = pair.row * kSide + i;
  if (!diagonal || i >= kSide || c >= p.channels) return;
  p.means[i_part * 2 * p.channels + c] = rows.origin[i];
  p.means[(i_part * 2 + 1) * p.channels + c] = rows.mean[i];
}

// ---- merging the parts of a sample ---------------------------------------------------------------------------------

// The means of a channel in all parts, relative to the origin of the first.
struct MeansOfChannel {
  const float* of_part;
  int channels;
  float origin;

  MIRAGE_DEVICE MeansOfChannel(const CovarianceArguments& p, int sample, int c)
      : of_part(p.means + int64_t(sample) * p.parts * 2 * p.channels + c), channels(p.channels), origin(of_part[0]) {}

  MIRAGE_DEVICE float operator[](int part) const {
    const float* mean = of_part + int64_t(part) * 2 * channels;
    return (mean[0] - origin) + mean[channels];
  }
};

// Stores origin + above as a rounded sum and its rounding error.
MIRAGE_DEVICE void store_mean(const CovarianceArguments& p, int sample, int c, float origin, float above) {
  const float mean = origin + above, added = mean - origin;
  float* out = p.mean + int64_t(sample) * 2 * p.channels + c;
  out[0] = mean;
  out[p.channels] = (origin - (mean - added)) + (above - added);
}

// Each lane of a block has a pair of channels, each warp every 16th part.
template <class T, int kSide>
MIRAGE_KERNEL(512) covariance_merge_kernel(const CovarianceArguments p) {
  constexpr int kSquare = kSide * kSide, kGroups = kSquare / kLanes;
  float* buffer = reinterpret_cast<float*>(shared_memory());
  const int i_pair = int(block_index() / kGroups % p.pairs()), sample = int(block_index() / kGroups / p.pairs());
  const int n = int(block_index() % kGroups) * kLanes + lane_index();
  const TilePair pair = tile_pair(p.tiles, i_pair);
  const InSquare at = in_square<kSide>(n);
  const int row = pair.row * kSide + at.row, column = pair.column * kSide + at.column;
  const bool in_bounds = row <= column && column < p.channels;
  const int first = in_bounds ? warp_index() : p.parts;
  const MeansOfChannel of_row(p, sample, in_bounds ? row : 0), of_column(p, sample, in_bounds ? column : 0);
  float mean[2] = {}, sum[1] = {};
#pragma unroll 4
  for (int part = first; part < p.parts; part += kMergeWarps) {
    const float count = float(p.pixels_of_part(part));
    mean[0] = fmaf(count, of_row[part], mean[0]);
    mean[1] = fmaf(count, of_column[part], mean[1]);
  }
  sum_over_warps(mean, kMergeWarps, buffer);
#pragma unroll
  for (int i = 0; i < 2; ++i) mean[i] /= float(p.pixels);
  const float* products = p.products + (int64_t(sample) * p.parts * p.pairs() + i_pair) * kSquare + n;
#pragma unroll 4
  for (int part = first; part < p.parts; part += kMergeWarps) {
    const float steps = (of_row[part] - mean[0]) * (of_column[part] - mean[1]);
    sum[0] += fmaf(float(p.pixels_of_part(part)), steps, products[int64_t(part) * p.pairs() * kSquare]);
  }
  sum_over_warps(sum, kMergeWarps, buffer + 2 * kMergeWarps * kLanes);
  if (!in_bounds || warp_index() != 0) return;
  const float value = sum[0] / float(p.pixels - 1) + (row == column ? p.eps : 0.0f);
  T* y = static_cast<T*>(p.y) + int64_t(sample) * p.channels * p.channels;
  y[int64_t(row) * p.channels + column] = y[int64_t(column) * p.channels + row] = from_float<T>(value);
  if (row == column) store_mean(p, sample, row, of_row.origin, mean[0]);
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <int kSide>
struct CovarianceBackwardTile {
  static constexpr int kPitch = kCovariancePixels + 8;  // see Window in tiles.h

  alignas(16) float panel[kSide * kSide];
  alignas(16) float pixels[kSide * kPitch];  // X - mu, then the result
};

// Stores a panel of (G + G^T) / (N - 1), kSide by kSide channels.
template <class Kind, class T, int kSide>
MIRAGE_DEVICE void store_symmetric(const CovarianceArguments& p, int sample, int first_row, int first_column,
                                   float* panel) {
  const T* grad = static_cast<const T*>(p.grad_y) + sample * p.grad_stride[0];
  store_panel<Kind, kSide, kSide, kCovarianceThreads>(panel, [&](int row, int k, float (&pair)[2]) {
    const int r = first_row + row, c = first_column + k;
    if (r >= p.channels || c >= p.channels) return;
    const float sum = to_float(grad[r * p.grad_stride[1] + c * p.grad_stride[2]]) +
                      to_float(grad[c * p.grad_stride[1] + r * p.grad_stride[2]]);
    pair[0] = sum / float(p.pixels - 1);
  });
}

// Loads X - mu for kSide channels. Zero beyond the pixels and channels.
template <class T, int kSide>
MIRAGE_DEVICE void load_centred(const CovarianceArguments& p, int sample, int begin, int first,
                                CovarianceBackwardTile<kSide>& tile) {
  constexpr int kRows = kSide / kCovarianceWarps;
  const float* mean = p.mean + int64_t(sample) * 2 * p.channels;
  float shift[kRows] = {}, rest[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int c = first + warp_index() + i * kCovarianceWarps;
    if (c < p.channels) shift[i] = mean[c], rest[i] = mean[p.channels + c];
  }
  PixelWalk<T> pixel(p.x, p.x.pixel<T>(sample, 0) + (first + warp_index()) * p.x.s_channel, begin + lane_index());
#pragma unroll 4
  for (int j = 0; j < kCovarianceRun; ++j, pixel.advance()) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = warp_index() + i * kCovarianceWarps;
      const bool in_bounds = pixel.n < p.pixels && first + row < p.channels;
      const float value = in_bounds ? to_float(pixel.at[i * p.x_step]) : 0.0f;
      tile.pixels[row * CovarianceBackwardTile<kSide>::kPitch + pixel.n - begin] =
          in_bounds ? (value - shift[i]) - rest[i] : 0.0f;
    }
  }
}

// Stores the result for kSide channels. It goes through shared memory, so that writes to global memory are coalesced.
template <class T, int kSide, int NT>
MIRAGE_DEVICE void store_grad_x(const CovarianceArguments& p, int sample, int begin, int first,
                                const float (&acc)[kSide / 16][NT][4], CovarianceBackwardTile<kSide>& tile) {
  constexpr int kPitch = CovarianceBackwardTile<kSide>::kPitch;
#pragma unroll
  for (int m = 0; m < kSide / 8; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int row = 8 * m + lane_index() / 4, pixel = 8 * (NT * warp_index() + n) + lane_index() % 4 * 2;
      store_pair(tile.pixels + row * kPitch + pixel, acc[m / 2][n][m % 2 * 2], acc[m / 2][n][m % 2 * 2 + 1]);
    }
  }
  sync_block();
  for (int row = warp_index(); row < kSide && first + row < p.channels; row += kCovarianceWarps) {
    T* grad_x = static_cast<T*>(p.y) + (int64_t(sample) * p.channels + first + row) * p.pixels + begin;
#pragma unroll
    for (int n = lane_index(); n < kCovariancePixels; n += kLanes) {
      if (begin + n < p.pixels) grad_x[n] = from_float<T>(tile.pixels[row * kPitch + n]);
    }
  }
}

// Each block computes kSide channels of the result, for a part of the pixels.
template <class Kind, class T, int kSide>
MIRAGE_KERNEL(256, 2) covariance_backward_kernel(const CovarianceArguments p) {
  using Tile = CovarianceBackwardTile<kSide>;
  constexpr int NT = kCovarianceShare / 8;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int row = int(block_index() % p.tiles) * kSide, part = int(block_index() / p.tiles % p.parts);
  const int sample = int(block_index() / p.tiles / p.parts);
  const int begin = part * p.part_pixels, end = begin + p.pixels_of_part(part);
  for (int n = begin; n < end; n += kCovariancePixels) {
    float acc[kSide / 16][NT][4] = {};
    for (int i = 0; i < p.tiles; ++i) {
      sync_block();  // the previous pixels and panel are no longer read
      if (n == begin || p.tiles > 1) store_symmetric<Kind, T, kSide>(p, sample, row, i * kSide, tile.panel);
      load_centred<T>(p, sample, n, i * kSide, tile);
      sync_block();
      multiply<kSide>(Kind(), tile.panel, tile.pixels + warp_index() * kCovarianceShare, Tile::kPitch, acc);
    }
    sync_block();
    store_grad_x<T>(p, sample, n, row, acc, tile);
  }
}

}  // namespace mirage::cuda
