// What the kernels of mixer_stage's backward share. What forward computed is computed again, a tile at a time; what one
// kernel leaves to a later one are maps of c channels, small sums, and the sums over pixels that make the gradients of
// the weights: each block adds up its own, in memory that belongs to it, and the last kernel those of all blocks.
//
//   prepare     moments of the layer norm for each pixel; weights as the others want them (backward_pack.h)
//   fusion      from grad_y back through project_out, the fusion, the MLP, proj_out, and attention x v
//   attention   small: from the gradient of the attention to those of q k^T, |q| and |k|
//   gate        back through gic2 and the gate
//   detail      back through the generated 7x7 kernels, to BatchNorm's output
//   query       back through q k^T, the norms, the depthwise convolution and qkv
//   generator   small: the gradients of the kernel generator, and of BatchNorm's statistics
//   input       back through BatchNorm and the layer norm
//   weights     sums over the blocks
//
// "g..." stands for "the gradient of ...".
#pragma once

#include "pack.h"

namespace mirage::cuda {

MIRAGE_ANYWHERE constexpr int in_eights(int n) { return (n + 7) / 8 * 8; }

// What the blocks of a kernel leave: `size` floats each; and of each sample that a block meets `of_sample` floats, at place
// block + sample. A block takes neighbouring tiles, so no two meet in a place, and those of a sample are neighbours.
struct MixerParts {
  float *sums, *samples;
  int blocks, size, of_sample;

  MIRAGE_DEVICE float* of_block(int64_t block) const { return sums + block * size; }
  MIRAGE_DEVICE float* of(int64_t block, int sample) const { return samples + (block + sample) * of_sample; }
};

// Blocks of a multiprocessor that the kernels are compiled for, by channels of a branch in sixteens. Each has its share of all
// tiles.
constexpr int mixer_fusion_blocks(int sixteens) { return sixteens <= 2 ? 2 : 1; }
constexpr int mixer_gate_blocks(int sixteens) { return sixteens <= 3 ? 2 : 1; }
constexpr int mixer_detail_blocks(int sixteens) { return sixteens <= 2 ? 2 : 1; }
constexpr int mixer_query_blocks(int sixteens) { return sixteens == 1 ? 3 : sixteens == 2 ? 2 : 1; }

// A block's way through its share of all tiles, sample by sample and line by line.
template <int kRows>
struct TileWalk {
  Corner at;
  int left;  // tiles, with that at `at`
  bool is_first = true;

  MIRAGE_DEVICE TileWalk(const MixerArguments& p, int64_t block, int64_t blocks) {
    const Tiling<kRows> tiling(p);
    const int64_t all = int64_t(p.batch) * tiling.of_sample, first = all * block / blocks;
    left = int(all * (block + 1) / blocks - first), at = tiling.corner(first);
  }

  MIRAGE_DEVICE bool is_first_of_sample() const { return is_first || (at.row == 0 && at.column == 0); }

  MIRAGE_DEVICE void next(const MixerArguments& p) {
    --left, is_first = false, at.column += 16;
    if (at.column < p.width) return;
    at.column = 0, at.row += kRows;
    if (at.row < p.height) return;
    at.row = 0, ++at.sample;
  }
};

// The block that has tile `tile`: the last that begins at it or before it.
MIRAGE_DEVICE int64_t block_of_tile(int64_t tile, int64_t all, int64_t blocks) {
  return ((tile + 1) * blocks - 1) / all;
}

// What the blocks of a kernel have left of a sample, which has `tiles` tiles there.
struct PartsOfSample {
  const float* first;
  int count, stride;

  MIRAGE_DEVICE PartsOfSample(const MixerParts& parts, int batch, int tiles, int sample) {
    const int64_t all = int64_t(batch) * tiles, begin = block_of_tile(int64_t(sample) * tiles, all, parts.blocks);
    first = parts.of(begin, sample), stride = parts.of_sample;
    count = int(block_of_tile((int64_t(sample) + 1) * tiles - 1, all, parts.blocks) - begin) + 1;
  }
};

// Where each matrix lies among a block's sums: rows of in_eights(columns) floats; those of gic2 have 16 for each of the
// gate's steps.
struct MixerSumsAt {
  int project_out, proj_out, mlp_in, mlp_out, alphas, of_fusion;  // gradients from the kernel `fusion`
  int gic2, gic1, gate_temperature, of_gate;                      // gate and identity rows of gic1
  int detail, batch_norm, of_detail;                              // detail rows of gic1; sums of gbn, and of it times nhat
  int qkv, taps, of_query;

  MIRAGE_ANYWHERE explicit MixerSumsAt(const MixerArguments& p) {
    const int c = p.branch, h = p.hidden, line = in_eights(c);
    project_out = 0, proj_out = project_out + 3 * c * in_eights(3 * c), mlp_in = proj_out + c * line;
    mlp_out = mlp_in + 2 * c * line, alphas = mlp_out + c * in_eights(2 * c), of_fusion = alphas + 8;
    gic2 = 0, gic1 = gic2 + c * 16 * MixerSteps(p).gate, gate_temperature = gic1 + (2 * h - c) * line;
    of_gate = gate_temperature + 8;
    detail = 0, batch_norm = detail + c * line, of_detail = in_eights(batch_norm + 2 * c);
    qkv = 0, taps = qkv + 3 * c * line, of_query = in_eights(taps + 27 * c);
  }
};

struct MixerBackwardArguments : MixerArguments {
  const void* grad_y;
  int64_t g_batch, g_channel, g_row, g_column;
  void* grad_x;
  // [B, c, H W] of the elements of x: the detail after its generated kernels and the gradient of that; the gradients of v
  // (after its convolution), of proj_out's input, of BatchNorm's output, and of n1 and n3.
  void *content, *grad_content, *grad_v, *grad_total, *grad_bn, *grad_n1, *grad_n3;
  float* backward;                         // packed: see backward_pack.h; aligned to 16 bytes
  MixerParts fusion, gate, detail, query, input;  // .samples: g attention [c, d] of fusion, g kernels [c, 49] of detail
  float* scales;                           // [B, 4, c]: see mixer_attention_backward_kernel
  float* grad_temperatures;                // [B, heads]
  float* grad_kernels;                     // [B, c, 49]
  float* vectors;                          // [B, 6, c]: see mixer_generator_backward_kernel
  float* batch_norm;                       // [B, 3, c]: see mixer_batch_norm_backward_kernel
  struct {  // of the shapes in mirage/mixer_stage.h
    float *norm_weight, *norm_bias, *qkv, *qkv_dwconv, *temperature, *bn_weight, *bn_bias, *gic1, *generator_in,
        *generator_out, *gate_temperature, *gic2, *proj_out, *mlp_in, *mlp_out, *alpha_att, *alpha_conv, *alpha_mlp,
        *project_out;
  } grad;
};

// ---- maps ----------------------------------------------------------------------------------------------------------

// Channel 0 of a sample of a map [B, c, H W].
template <class T>
MIRAGE_DEVICE T* map_of(const MixerArguments& p, void* map, int sample) {
  return static_cast<T*>(map) + int64_t(sample) * p.branch * p.plane();
}

// The pixels of a window of a tensor that the kernel does not write, whose first channel is `from`; zero outside the image, and channels from `channels` on
// to kChannels.
template <class Window, int kChannels, class T>
MIRAGE_DEVICE void load_window(const MixerArguments& p, const Corner& at, const T* from, int64_t s_channel, int64_t s_row,
                               int64_t s_column, int channels, T* out) {
  constexpr int kMargin = (Window::kLine - Window::kColumns) / 2;
  const Corner first{at.sample, at.row - kMargin, at.column - kMargin};  // of the window
  const unsigned thread = unsigned(renewed(thread_index())), lane = thread % kLanes;
  unsigned offset[Window::kGroups];
  uint32_t within = 0;
#pragma unroll
  for (int j = 0; j < Window::kGroups; ++j) {
    const unsigned n = kLanes * j + lane, row = n / Window::kLine, column = n % Window::kLine;
    const bool known = n < Window::kPixels && inside(p, first.row + int(row), first.column + int(column));
    within |= uint32_t(known) << j;
    offset[j] = row * unsigned(s_row) + column * unsigned(s_column);
  }
  from += corner_of(first, s_row, s_column);
#pragma unroll 1
  for (int c = int(thread / kLanes); c < kChannels; c += kTileWarps) {
    const uint32_t wanted = c < channels ? within : 0;
    const T* channel = settled(from + c * s_channel);
    T value[Window::kGroups];
#pragma unroll
    for (int j = 0; j < Window::kGroups; ++j) {
      value[j] = wanted >> j & 1 ? load_constant(channel + offset[j]) : from_float<T>(0.0f);
    }
#pragma unroll
    for (int j = 0; j < Window::kGroups; ++j) out[c * Window::kPitch + kLanes * j + lane] = value[j];
  }
}

// Of a map.
template <class Window, int kBlocks, class T>
MIRAGE_DEVICE void load_map(const MixerArguments& p, const Corner& at, void* map, T* out) {
  load_window<Window, 16 * kBlocks>(p, at, static_cast<const T*>(map_of<T>(p, map, at.sample)), p.plane(), int64_t(p.width),
                                    int64_t(1), p.branch, out);
}

// Calls use(element of a sample's map [c, H W], value) for the values of fragments that lie in the image and below
// `channels`.
template <class Tile, class T, class Fragments, class Use>
MIRAGE_DEVICE void for_known(const MixerArguments& p, const Corner& at, int channels, T* map, Fragments& acc, Use use) {
  const FragmentPixels<Tile::Inner::kTiles> pixels(p.height, p.width, at);
  for_known(pixels, channels, map + corner_of(at, p.width, 1), p.plane(), p.width, acc, use);
}

template <class Tile>
MIRAGE_DEVICE void store_map(const MixerArguments& p, const Corner& at,
                             const float (&acc)[Tile::kBranch / 16][Tile::Inner::kTiles][4], void* map) {
  using T = typename Tile::T;
  for_known<Tile>(p, at, p.branch, map_of<T>(p, map, at.sample), acc,
                  [](T& to, float value) { to = from_float<T>(value); });
}

// ---- sums over pixels ----------------------------------------------------------------------------------------------

// Rows of pixels in shared memory that are a factor of such a sum.
template <class T>
struct PixelRows {
  const T* data;
  int pitch, rows;
};

// sums [left.rows, in_eights(right.rows)], whose rows are `line` apart, += left right^T, or = where `is_first`. No barrier:
// each sum is always of the same thread. The first item is of warp `turn`: matrices of few items meet different warps.
template <class Kind, int kPixels, class T>
MIRAGE_DEVICE void add_matrix(bool is_first, const PixelRows<T>& left, const PixelRows<T>& right, float* sums, int line,
                              int turn = 0) {
  const int across = in_eights(right.rows) / 8, items = (left.rows + 15) / 16 * across;
  const int thread = renewed(thread_index()), g = thread % kLanes / 4, t = thread % 4;
#pragma unroll 1
  for (int item = (thread / kLanes + kTileWarps - turn) % kTileWarps; item < items; item += kTileWarps) {
    const int row = item / across * 16, column = item % across * 8;
    float* to = sums + int64_t(row + g) * line + column + 2 * t;
    float before[4] = {}, acc[4] = {};
    if (!is_first && row + g < left.rows) load_packed<2>(to, before);
    if (!is_first && row + g + 8 < left.rows) load_packed<2>(to + 8 * line, before + 2);
    multiply_rows<kPixels>(Kind(), left.data + row * left.pitch, left.pitch, right.data + column * right.pitch, right.pitch,
                           acc);
    if (row + g < left.rows) store_pair(to, before[0] + acc[0], before[1] + acc[1]);
    if (row + g + 8 < left.rows) store_pair(to + 8 * line, before[2] + acc[2], before[3] + acc[3]);
  }
}

}  // namespace mirage::cuda
