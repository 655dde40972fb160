// The kernel of mixer_stage's backward for the generated 7x7 kernels, and through gic1 to BatchNorm's output.
#pragma once

#include "backward_pack.h"
#include "fuse.h"

namespace mirage::cuda {

// Steps: the panels that compute the detail, then the same transposed.
template <class T, int kChannelTiles>
struct MixerDetailSteps {
  static constexpr int kPanels = 1;
  const MixerBackwardArguments& p;

  MIRAGE_DEVICE void jump(int i, const T*& from) const {
    if (i == 0) from = mixer_weight_steps<T>(p) + kChannelTiles * mixer_step(kChannelTiles);
    if (i == kChannelTiles) from = mixer_backward_step<T>(p, MixerBackwardSteps(p).detail);
  }
};

template <class Kind, int kChannelTiles, int kRows>
struct MixerDetailTile {
  using T = typename Kind::Element;
  using Far = Window<kRows, 3>;
  using Inner = Window<kRows, 0>;
  using Run = TileRun<Inner>;
  using Stream = PanelStream<T, kChannelTiles, MixerDetailSteps<T, kChannelTiles>>;
  static constexpr int kBranch = 16 * kChannelTiles, kRun = Run::kRun, kPanel = 16 * kBranch;

  alignas(16) T values[kBranch * Far::kPitch];  // BatchNorm of n2, then the detail
  alignas(16) T grad[kBranch * Far::kPitch];    // gradient of the convolved detail; at last gbn
  alignas(16) T normal[kBranch * Inner::kPitch];
  alignas(16) T chunk[16 * Inner::kPitch];      // 16 channels of the detail's gradient
  alignas(16) T steps[2][Stream::kStep];
  alignas(16) float kernels[16 * kMixerKernel];

  MIRAGE_DEVICE T* detail() { return values; }
  MIRAGE_DEVICE PixelRows<T> rows(const T* map, int channels) const { return {map, Inner::kPitch, channels}; }
};

// Computes the gradient of 16 channels of the detail: the convolution of the output gradient with the flipped kernels.
template <class Tile>
MIRAGE_DEVICE void convolve_flipped(const MixerArguments& p, const Corner& at, int first, Tile& tile) {
  const typename Tile::Run run(opaque(thread_index()));
  float sum[Tile::kRun] = {};
  if (first + run.channel < p.branch) {
    const auto* line = tile.grad + (first + run.channel) * Tile::Far::kPitch + run.row * Tile::Far::kLine + run.column;
    convolve_run_7x7<typename Tile::Far, true>(line, tile.kernels + run.channel * kMixerKernel, sum);
  }
  store_in_bounds(p, at.row + run.row, at.column + run.column, sum, tile.chunk + run.place());
}

// Adds the gradients of the generated kernels [c, 49]. A warp has a channel; seven lanes have the lines of its kernel,
// for a quarter of the tile's lines.
template <class Tile>
MIRAGE_DEVICE void add_kernels(const MixerArguments& p, bool is_first, float* sums, const Tile& tile) {
  using Far = typename Tile::Far;
  constexpr int kLines = Tile::Inner::kPixels / 16 / 4;
  const int lane = lane_index(), quarter = lane / 8, y = lane % 8;
#pragma unroll 1
  for (int c = warp_index(); c < p.branch; c += kTileWarps) {
    float sum[7] = {};
    const auto* grad = tile.grad + c * Far::kPitch + (quarter * kLines + 3) * Far::kLine + 3;
    const auto* value = tile.values + c * Far::kPitch + (quarter * kLines + (y < 7 ? y : 0)) * Far::kLine;
#pragma unroll 1
    for (int i = 0; i < kLines; ++i, grad += Far::kLine, value += Far::kLine) {
      float near[22];
#pragma unroll
      for (int j = 0; j < 22; j += 2) load_packed<2>(value + j, near + j);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float of_pixel = to_float(grad[j]);
#pragma unroll
        for (int x = 0; x < 7; ++x) sum[x] = fmaf(of_pixel, near[j + x], sum[x]);
      }
    }
#pragma unroll
    for (int x = 0; x < 7; ++x) {
      sum[x] += shfl_xor(sum[x], 8);
      sum[x] += shfl_xor(sum[x], 16);
      float* to = sums + c * kMixerTaps + 7 * y + x;
      if (quarter == 0 && y < 7) *to = (is_first ? 0.0f : *to) + sum[x];
    }
  }
}

// Adds, for each channel, two sums over the tile's pixels: of gbn, which is in `grad`, and of gbn times the normalised
// input. One warp per channel.
template <class Tile>
MIRAGE_DEVICE void add_batch_norm(const MixerArguments& p, const Corner& at, bool is_first, float* sums,
                                  const Tile& tile) {
  using T = typename Tile::T;
  constexpr int kPixels = Tile::Inner::kPixels / kLanes;
  const T* x = static_cast<const T*>(p.x) + at.sample * p.s_batch + int64_t(p.branch) * p.s_channel;
  const NormMoments* moments = p.moments + at.sample * p.plane();
  const float *weight = p.packed, *bias = weight + 3 * Tile::kBranch;
#pragma unroll 1
  for (int c = warp_index(); c < p.branch; c += kTileWarps) {
    const float w = weight[p.branch + c], b = bias[p.branch + c];
    const float mean = p.batch_mean[c], inverse = 1.0f / sqrtf(p.batch_var[c] + p.bn_eps);
    float sum = 0.0f, along = 0.0f;
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const int n = kLanes * j + lane_index(), row = at.row + n / 16, column = at.column + n % 16;
      if (!is_in_bounds(p, row, column)) continue;
      const int64_t place = int64_t(row) * p.width + column;
      const float value = to_float(x[c * p.s_channel + row * p.s_row + column * p.s_column]);
      const NormMoments of = moments[place];
      const float normal = fmaf((value - of.mean) * of.rstd, w, b);
      const float grad = to_float(tile.grad[c * Tile::Inner::kPitch + n]);
      sum += grad;
      along = fmaf(grad, (normal - mean) * inverse, along);
    }
    sum = warp_all_reduce_sum(sum), along = warp_all_reduce_sum(along);
    if (lane_index() != 0) continue;
    sums[c] = (is_first ? 0.0f : sums[c]) + sum;
    sums[p.branch + c] = (is_first ? 0.0f : sums[p.branch + c]) + along;
  }
}

// Computes the gradient of BatchNorm's output: the part that the gate has left, plus the part through the detail.
template <class Kind, class Tile>
MIRAGE_DEVICE void detail_backward(const MixerBackwardArguments& p, const Corner& at, bool is_first, float* sums,
                                   typename Tile::Stream& stream, Tile& tile, MixerFragments<Tile>& grad) {
  using T = typename Tile::T;
  using Inner = typename Tile::Inner;
  const float* kernels = mixer_kernels<T>(p, at.sample);
  const int line = round_up_to_8(p.branch);
  const T* of_gate = map_of<T>(p, p.grad_bn, at.sample);
  for_in_bounds<Tile>(p, at, p.branch, of_gate, grad, [](const T& from, float& value) { value = to_float(from); });
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const T* panel = stream.next(Tile::kPanel);  // the previous chunk has been read
    copy_to_block<kTileThreads>(tile.kernels, kernels + first * kMixerKernel);
    wait_for_copies();
    sync_block();
    convolve_flipped(p, at, first, tile);
    sync_block();
    multiply_inner<Kind, 16, Tile>(panel, tile.chunk, grad);
    const int count = p.branch - first < 16 ? p.branch - first : 16;
    add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.chunk, count), tile.rows(tile.normal, p.branch),
                                     sums + MixerSumsAt(p).detail + first * line, line);
  }
}

template <class Kind, int kChannelTiles, int kRows>
MIRAGE_KERNEL(256, mixer_detail_blocks(kChannelTiles)) mixer_detail_backward_kernel(const MixerBackwardArguments p) {
  using Tile = MixerDetailTile<Kind, kChannelTiles, kRows>;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  TileWalk<kRows> walk(p, block_index(), p.detail.blocks);
  float* sums = p.detail.of_block(block_index());
#pragma unroll 1
  for (; walk.left > 0; walk.next(p)) {
    const Corner at = walk.at;
    const bool is_first = walk.is_first;
    sync_block();  // all threads have finished with the previous tile
    typename Tile::Stream stream({p}, 2 * kChannelTiles, Tile::kPanel, tile.steps);
    load_third<typename Tile::Far, kChannelTiles>(p, at, 1, tile.values, MixerBatchNorm(p));
    load_map<typename Tile::Far, kChannelTiles>(p, at, p.grad_content, tile.grad);
    sync_block();
    copy_inner<Tile>(tile.values, tile.normal);
    project_detail<Kind>(stream, tile, Tile::kPanel);
    MixerFragments<Tile> grad = {};
    detail_backward<Kind>(p, at, is_first, sums, stream, tile, grad);
    add_kernels(p, walk.is_first_of_sample(), p.detail.of(block_index(), at.sample), tile);
    sync_block();  // all have read the gradient, which is now overwritten
    store_fragments<Tile>(grad, tile.grad);
    store_map<Tile>(p, at, grad, p.grad_bn);
    sync_block();
    add_batch_norm(p, at, is_first, sums + MixerSumsAt(p).batch_norm, tile);
  }
}

}  // namespace mirage::cuda
