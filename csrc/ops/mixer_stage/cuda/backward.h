// What the kernels of mixer_stage's backward share. They recompute what forward computed, one tile at a time. A kernel
// leaves to later ones activations of c channels, small sums, and the sums over pixels for the weight gradients: each
// block adds up its own in global memory that belongs to it, and the last kernel adds up those of all blocks.
//
//   prepare     moments of the layer norm for each pixel; weights in the order of the other kernels (backward_pack.h)
//   fusion      backward of project_out, the fusion, the MLP, proj_out, and attention x v
//   attention   small: from the gradient of the attention to those of q k^T, |q| and |k|
//   gate        backward of gic2 and the gate
//   detail      backward of the generated 7x7 kernels, to BatchNorm's output
//   query       backward of q k^T, the norms, the depthwise convolution and qkv
//   generator   small: the gradients of the kernel generator, and of BatchNorm's statistics
//   input       backward of BatchNorm and the layer norm
//   weights     sums over the blocks
//
// "g..." stands for "the gradient of ...".
#pragma once

#include "pack.h"

namespace mirage::cuda {

MIRAGE_ANYWHERE constexpr int round_up_to_8(int n) { return (n + 7) / 8 * 8; }

// The sums that the blocks of a kernel leave: `size` floats per block, and `of_sample` floats for each sample that a
// block has tiles of, at index block + sample. A block takes consecutive tiles, so no two blocks write to one index,
// and the parts of a sample are adjacent.
struct MixerParts {
  float *sums, *samples;
  int blocks, size, of_sample;

  MIRAGE_DEVICE float* of_block(int64_t block) const { return sums + block * size; }
  MIRAGE_DEVICE float* of(int64_t block, int sample) const { return samples + (block + sample) * of_sample; }
};

// Blocks per SM that the kernels are compiled for, by the channels of a branch in sixteens. As many blocks are
// launched, with an equal share of the tiles each.
constexpr int mixer_fusion_blocks(int channel_tiles) { return channel_tiles <= 2 ? 2 : 1; }
constexpr int mixer_gate_blocks(int channel_tiles) { return channel_tiles <= 3 ? 2 : 1; }
constexpr int mixer_detail_blocks(int channel_tiles) { return channel_tiles <= 2 ? 2 : 1; }
constexpr int mixer_query_blocks(int channel_tiles) { return channel_tiles == 1 ? 3 : channel_tiles == 2 ? 2 : 1; }

// A block's walk through its share of the tiles, sample by sample, row by row.
template <int kRows>
struct TileWalk {
  Corner at;
  int left;  // tiles left, the current one included
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

// The block that has tile `tile`, which is the last block that starts at it or before it.
MIRAGE_DEVICE int64_t block_of_tile(int64_t tile, int64_t all, int64_t blocks) {
  return ((tile + 1) * blocks - 1) / all;
}

// The parts that the blocks of a kernel have left of a sample, which has `tiles` tiles in that kernel.
struct PartsOfSample {
  const float* first;
  int count, stride;

  MIRAGE_DEVICE PartsOfSample(const MixerParts& parts, int batch, int tiles, int sample) {
    const int64_t all = int64_t(batch) * tiles, begin = block_of_tile(int64_t(sample) * tiles, all, parts.blocks);
    first = parts.of(begin, sample), stride = parts.of_sample;
    count = int(block_of_tile((int64_t(sample) + 1) * tiles - 1, all, parts.blocks) - begin) + 1;
  }
};

// Offsets of the matrices among a block's sums. Rows have round_up_to_8(columns) floats; those of gic2 have 16 for each
// of the gate's steps.
struct MixerSumsAt {
  int project_out, proj_out, mlp_in, mlp_out, alphas, of_fusion;  // from the kernel `fusion`
  int gic2, gic1, gate_temperature, of_gate;                      // gate and identity rows of gic1
  int detail, batch_norm, of_detail;                              // detail rows of gic1; sums of gbn and gbn * nhat
  int qkv, taps, of_query;

  MIRAGE_ANYWHERE explicit MixerSumsAt(const MixerArguments& p) {
    const int c = p.branch, h = p.hidden, line = round_up_to_8(c);
    project_out = 0, proj_out = project_out + 3 * c * round_up_to_8(3 * c), mlp_in = proj_out + c * line;
    mlp_out = mlp_in + 2 * c * line, alphas = mlp_out + c * round_up_to_8(2 * c), of_fusion = alphas + 8;
    gic2 = 0, gic1 = gic2 + c * 16 * MixerSteps(p).gate, gate_temperature = gic1 + (2 * h - c) * line;
    of_gate = gate_temperature + 8;
    detail = 0, batch_norm = detail + c * line, of_detail = round_up_to_8(batch_norm + 2 * c);
    qkv = 0, taps = qkv + 3 * c * line, of_query = round_up_to_8(taps + 27 * c);
  }
};

struct MixerBackwardArguments : MixerArguments {
  const void* grad_y;
  int64_t g_batch, g_channel, g_row, g_column;
  void* grad_x;
  // Activations [B, c, H W] in the dtype of x: the detail convolved with its generated kernels, and the gradient of
  // that; the gradients of v (after its convolution), of proj_out's input, of BatchNorm's output, and of n1 and n3.
  void *content, *grad_content, *grad_v, *grad_total, *grad_bn, *grad_n1, *grad_n3;
  float* backward;                         // packed weights, see backward_pack.h; aligned to 16 bytes
  MixerParts fusion, gate, detail, query, input;  // .samples: gattention [c, d] of fusion, gkernels [c, 49] of detail
  float* scales;                           // [B, 4, c]: see mixer_attention_backward_kernel
  float* grad_temperatures;                // [B, heads]
  float* grad_kernels;                     // [B, c, 49]
  float* vectors;                          // [B, 6, c]: see mixer_generator_backward_kernel
  float* batch_norm;                       // [B, 3, c]: see mixer_batch_norm_backward_kernel
#define MIRAGE_GRADIENT_POINTER(name, ...) float* name;
  struct {  // of the shapes in mirage/mixer_stage.h
    MIRAGE_MIXER_WEIGHTS(MIRAGE_GRADIENT_POINTER, MIRAGE_GRADIENT_POINTER, MIRAGE_NO_WEIGHT)
  } grad;
#undef MIRAGE_GRADIENT_POINTER
};

// ---- activations in global memory ----------------------------------------------------------------------------------

// Channel 0 of a sample in activations [B, c, H W].
template <class T>
MIRAGE_DEVICE T* map_of(const MixerArguments& p, void* map, int sample) {
  return static_cast<T*>(map) + int64_t(sample) * p.branch * p.plane();
}

// Loads a window of a tensor that the kernel does not write. `from` is its first channel. Zero out of bounds, and for
// channels from `channels` on to kChannels.
template <class Window, int kChannels, class T>
MIRAGE_DEVICE void load_window(const MixerArguments& p, const Corner& at, const T* from, int64_t s_channel,
                               int64_t s_row, int64_t s_column, int channels, T* out) {
  constexpr int kHalo = (Window::kLine - Window::kColumns) / 2;
  const Corner first{at.sample, at.row - kHalo, at.column - kHalo};  // corner of the window
  const unsigned thread = unsigned(opaque(thread_index())), lane = thread % kLanes;
  unsigned offset[Window::kGroups];
  uint32_t in_bounds_mask = 0;
#pragma unroll
  for (int j = 0; j < Window::kGroups; ++j) {
    const unsigned n = kLanes * j + lane, row = n / Window::kLine, column = n % Window::kLine;
    const bool in_bounds = n < Window::kPixels && is_in_bounds(p, first.row + int(row), first.column + int(column));
    in_bounds_mask |= uint32_t(in_bounds) << j;
    offset[j] = row * unsigned(s_row) + column * unsigned(s_column);
  }
  from += corner_of(first, s_row, s_column);
#pragma unroll 1
  for (int c = int(thread / kLanes); c < kChannels; c += kTileWarps) {
    const uint32_t wanted = c < channels ? in_bounds_mask : 0;
    const T* channel = opaque_global(from + c * s_channel);
    T value[Window::kGroups];
#pragma unroll
    for (int j = 0; j < Window::kGroups; ++j) {
      value[j] = wanted >> j & 1 ? load_constant(channel + offset[j]) : from_float<T>(0.0f);
    }
#pragma unroll
    for (int j = 0; j < Window::kGroups; ++j) out[c * Window::kPitch + kLanes * j + lane] = value[j];
  }
}

// Loads a window of activations [B, c, H W].
template <class Window, int kChannelTiles, class T>
MIRAGE_DEVICE void load_map(const MixerArguments& p, const Corner& at, void* map, T* out) {
  load_window<Window, 16 * kChannelTiles>(p, at, static_cast<const T*>(map_of<T>(p, map, at.sample)), p.plane(),
                                          int64_t(p.width), int64_t(1), p.branch, out);
}

// Calls use(element of a sample's activations [c, H W], value) for the accumulators that are in bounds and below
// `channels`.
template <class Tile, class T, class Fragments, class Use>
MIRAGE_DEVICE void for_in_bounds(const MixerArguments& p, const Corner& at, int channels, T* map, Fragments& acc,
                                 Use use) {
  const FragmentPixels<Tile::Inner::kTiles> pixels(p.height, p.width, at);
  for_in_bounds(pixels, channels, map + corner_of(at, p.width, 1), p.plane(), p.width, acc, use);
}

template <class Tile>
MIRAGE_DEVICE void store_map(const MixerArguments& p, const Corner& at,
                             const float (&acc)[Tile::kBranch / 16][Tile::Inner::kTiles][4], void* map) {
  using T = typename Tile::T;
  for_in_bounds<Tile>(p, at, p.branch, map_of<T>(p, map, at.sample), acc,
                      [](T& to, float value) { to = from_float<T>(value); });
}

// ---- sums over pixels ----------------------------------------------------------------------------------------------

// Rows of pixels in shared memory, one factor of a matrix product over pixels.
template <class T>
struct PixelRows {
  const T* data;
  int pitch, rows;
};

// sums [left.rows, round_up_to_8(right.rows)], with rows `line` apart, += left right^T, or = if `is_first`. No barrier
// is needed, as each sum belongs to one thread. Warp `turn` starts, so that several small matrices occupy different
// warps.
template <class Kind, int kPixels, class T>
MIRAGE_DEVICE void add_matrix(bool is_first, const PixelRows<T>& left, const PixelRows<T>& right, float* sums, int line,
                              int turn = 0) {
  const int across = round_up_to_8(right.rows) / 8, items = (left.rows + 15) / 16 * across;
  const int thread = opaque(thread_index()), g = thread % kLanes / 4, t = thread % 4;
#pragma unroll 1
  for (int item = (thread / kLanes + kTileWarps - turn) % kTileWarps; item < items; item += kTileWarps) {
    const int row = item / across * 16, column = item % across * 8;
    float* to = sums + int64_t(row + g) * line + column + 2 * t;
    float before[4] = {}, acc[4] = {};
    if (!is_first && row + g < left.rows) load_packed<2>(to, before);
    if (!is_first && row + g + 8 < left.rows) load_packed<2>(to + 8 * line, before + 2);
    multiply_rows<kPixels>(Kind(), left.data + row * left.pitch, left.pitch, right.data + column * right.pitch,
                           right.pitch, acc);
    if (row + g < left.rows) store_pair(to, before[0] + acc[0], before[1] + acc[1]);
    if (row + g + 8 < left.rows) store_pair(to + 8 * line, before[2] + acc[2], before[3] + acc[3]);
  }
}

}  // namespace mirage::cuda
