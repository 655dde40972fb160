// Two kernels of mixer_stage's backward: the small one that turns the gradient of the attention into those of q k^T, |q| and
// |k|, and the one that goes back through them, through the depthwise convolution of q, k and v, and through qkv.
#pragma once

#include "backward_pack.h"
#include "common/cuda/sums.h"
#include "fuse.h"
#include "ops/channel_attention/cuda_softmax.h"

namespace mirage::cuda {

// ---- attention_backward --------------------------------------------------------------------------------------------

// `scales` [B, 4, c]: what each row of the gradient of q k^T has been divided by, the same of its transpose, and what q and
// k are multiplied by in their own gradients.
enum MixerScale { kRowScale, kColumnScale, kScaleOfQ, kScaleOfK };

// Shared memory of a block: the gradient of the attention [c, d], then of the scores times the cosines; that of q k^T
// [c, d]; and of each row the gradient of the temperature, its divisor, and that of the transpose.
MIRAGE_ANYWHERE int attention_backward_room(const MixerArguments& p) {
  const int entries = p.branch * p.depth();
  return entries > kTileThreads ? entries : kTileThreads;  // of sum_parts, too
}

MIRAGE_ANYWHERE int attention_backward_floats(const MixerArguments& p) {
  return p.branch * p.depth() + attention_backward_room(p) + 3 * p.branch;
}

struct MixerAttentionRoom {
  float *grad, *gram, *of_temperature, *row_scale, *column_scale;

  MIRAGE_DEVICE MixerAttentionRoom(const MixerArguments& p, float* room)
      : grad(room), gram(grad + p.branch * p.depth()), of_temperature(gram + attention_backward_room(p)),
        row_scale(of_temperature + p.branch), column_scale(row_scale + p.branch) {}
};

// Of a head of a sample: see finalise_attention.
struct MixerHead {
  const float *attention, *gram, *norm_q, *norm_k;

  MIRAGE_DEVICE MixerHead(const MixerArguments& p, int sample, int head)
      : attention(p.attention + (int64_t(sample) * p.heads + head) * (2 * p.depth() + 2) * p.depth()),
        gram(attention + p.depth() * p.depth()), norm_q(gram + p.depth() * p.depth()), norm_k(norm_q + p.depth()) {}
};

// What a row is divided by whose largest magnitude is `most`. Where that is no number, nothing of the gradient is one.
MIRAGE_DEVICE float divisor_of(float most) { return most < INFINITY ? most : NAN; }
MIRAGE_DEVICE float divided(float value, float by) { return by > 0.0f ? value / by : by == 0.0f ? 0.0f : 1.0f; }

// Channel i of q. A warp.
MIRAGE_DEVICE void return_from_softmax(const MixerArguments& p, int sample, int i, float temperature, float* scales,
                                       const MixerAttentionRoom& room) {
  const int d = p.depth(), from = i % d * d;
  const MixerHead head(p, sample, i / d);
  const float norm = head.norm_q[i % d], inverse_q = 1.0f / floored(norm);
  float *grad = room.grad + i * d, *gram = room.gram + i * d, along = 0.0f, centre = 0.0f;
  for (int j = lane_index(); j < d; j += kLanes) {
    const float attention = head.attention[from + j];
    along = fmaf(grad[j], attention, along);
    centre = fmaf(head.gram[from + j] * (inverse_q / floored(head.norm_k[j])), attention, centre);
  }
  along = sum_of_warp(along), centre = sum_of_warp(centre);
  // The gradients of a row's scores add up to zero, so their sum with the cosines is that with centred ones: which does not
  // feel the rounding of `along`.
  float of_row = 0.0f, most = 0.0f;
  for (int j = lane_index(); j < d; j += kLanes) {
    const float of_score = head.attention[from + j] * (grad[j] - along), inverse = inverse_q / floored(head.norm_k[j]);
    const float cosine = head.gram[from + j] * inverse;
    gram[j] = of_score * inverse * temperature;
    grad[j] = of_score * cosine;
    of_row = fmaf(of_score, cosine - centre, of_row);
    most = at_least(fabsf(gram[j]), most);
  }
  of_row = sum_of_warp(of_row), most = max_of_warp(most);
  if (lane_index() != 0) return;
  room.of_temperature[i] = of_row;
  scales[kRowScale * p.branch + i] = room.row_scale[i] = divisor_of(most);
  // Below the floor q is divided by a constant, and its norm has no gradient.
  scales[kScaleOfQ * p.branch + i] = norm < kNormFloor ? 0.0f : -temperature * of_row * inverse_q * inverse_q;
}

// Channel j of k. A thread.
MIRAGE_DEVICE void return_from_length(const MixerArguments& p, int sample, int j, float temperature, float* scales,
                                    const MixerAttentionRoom& room) {
  const int d = p.depth(), first = j / d * d * d + j % d;
  float of_column = 0.0f, most = 0.0f;
  for (int i = 0; i < d; ++i) {
    of_column += room.grad[first + i * d];
    most = at_least(fabsf(room.gram[first + i * d]), most);
  }
  const float norm = MixerHead(p, sample, j / d).norm_k[j % d], inverse = 1.0f / floored(norm);
  scales[kColumnScale * p.branch + j] = room.column_scale[j] = divisor_of(most);
  scales[kScaleOfK * p.branch + j] = norm < kNormFloor ? 0.0f : -temperature * of_column * inverse * inverse;
}

// A block a sample, which has `tiles_of_sample` tiles in the kernel `fusion`.
template <class Kind, class W>
MIRAGE_KERNEL(256) mixer_attention_backward_kernel(const MixerBackwardArguments p, const int tiles_of_sample) {
  const MixerAttentionRoom room(p, reinterpret_cast<float*>(shared_memory()));
  const int sample = int(block_index()), d = p.depth();
  const PartsOfSample parts(p.fusion, p.batch, tiles_of_sample, sample);
  sum_parts<kTileThreads>(parts.first, parts.count, parts.stride, p.branch * d, room.gram, room.grad);
  const auto temperature = p.weights<W>(p.temperature);
  float* scales = p.scales + int64_t(sample) * 4 * p.branch;
  for (int i = warp_index(); i < p.branch; i += kTileWarps) {
    return_from_softmax(p, sample, i, temperature[i / d], scales, room);
  }
  sync_block();
  for (int j = thread_index(); j < p.branch; j += kTileThreads) {
    return_from_length(p, sample, j, temperature[j / d], scales, room);
  }
  for (int head = thread_index(); head < p.heads; head += kTileThreads) {
    float sum = 0.0f;
    for (int i = head * d; i < (head + 1) * d; ++i) sum += room.of_temperature[i];
    p.grad_temperatures[int64_t(sample) * p.heads + head] = sum;
  }
  sync_block();
  pack_sample<Kind>(p, sample, 1, [&](int row, int column) {
    return divided(room.gram[row * d + column % d], room.row_scale[row]);
  });
  pack_sample<Kind>(p, sample, 2, [&](int row, int column) {
    return divided(room.gram[column * d + row % d], room.column_scale[row]);
  });
}

// ---- query ---------------------------------------------------------------------------------------------------------

// q and k; the gradient of q k^T and its transpose; q, k and v.
template <class T, int kBlocks>
struct MixerQuerySteps {
  static constexpr int kPanels = 2;
  static constexpr int kAll = 7 * kBlocks;
  const MixerBackwardArguments& p;
  int sample;

  MIRAGE_DEVICE void jump(int i, const T*& from) const {
    if (i == 0 || i == 4 * kBlocks) from = mixer_backward_step<T>(p, MixerBackwardSteps(p).qkv);
    if (i == 2 * kBlocks) from = mixer_backward_step<T>(p, MixerBackwardSteps(p).of_sample(sample, 1));
  }
};

template <class Kind, int kBlocks, int kRows>
struct MixerQueryBackwardTile {
  using T = typename Kind::Element;
  using Far = Window<kRows, 2>;
  using Near = Window<kRows, 1>;
  using Inner = Window<kRows, 0>;
  using Run = TileRun<Inner>;
  using Stream = PanelStream<T, kBlocks, MixerQuerySteps<T, kBlocks>>;
  static constexpr int kBranch = 16 * kBlocks, kPanel = 16 * kBranch;
  static constexpr int kRun = Run::kRun;  // of the tile's pixels
  // q and k are convolved a warp a channel, with 30 lanes that have runs of this size of the near window.
  static constexpr int kNearRun = kRows == 8 ? 6 : 4, kNearRuns = (Near::kLine + kNearRun - 1) / kNearRun;
  static constexpr int kNearLanes = (kRows + 2) * kNearRuns;
  // Pixel n of the far window is at place n of its hidden tile.
  static constexpr int kHiddenPitch = kRows == 8 ? 248 : 168;
  // Where the far window without its first and last line lies, in products; of eight lines that is no fewer of them.
  static constexpr int kMiddleFirst = kRows == 8 ? 0 : 16, kMiddleTiles = kRows == 8 ? Far::kTiles : 2;
  static_assert(Far::kLine == kHiddenLine && kHiddenPitch % 16 == 8 && Far::kPixels <= kHiddenPitch);
  static_assert(kNearLanes <= kLanes && kMiddleFirst <= kHiddenLine);
  static_assert(Inner::kPixels / kRun == 16);  // threads of a channel
  static_assert(kMiddleFirst + 8 * kTileWarps * kMiddleTiles >= (kRows + 3) * kHiddenLine);

  alignas(16) T normal[kBranch * Far::kPitch];         // n1
  alignas(16) T inner_normal[kBranch * Inner::kPitch];  // of the tile
  alignas(16) T q[kBranch * Near::kPitch];              // then its gradient, then that of v
  alignas(16) T k[kBranch * Near::kPitch];              // then its gradient
  alignas(16) float hidden[16 * kHiddenPitch];          // before the depthwise convolution
  alignas(16) T chunk[16 * Inner::kPitch];              // of its gradient
  alignas(16) T steps[2][Stream::kStep];
  alignas(16) float taps[3 * kBranch * 12];

  MIRAGE_DEVICE PixelRows<T> rows(const T* map, int channels) const { return {map, Inner::kPitch, channels}; }
};

// 16 channels of qkv n1 to the hidden tile: kTiles of a warp, from pixel kFirst of the far window on.
template <class Kind, int kFirst, int kTiles, class Tile>
MIRAGE_DEVICE void project_far(const typename Tile::T* panel, Tile& tile) {
  using Far = typename Tile::Far;
  float acc[1][kTiles][4] = {};
  const int thread = renewed(thread_index()), g = thread % kLanes / 4, t = thread % 4;
  const int start = kFirst + 8 * kTiles * (thread / kLanes);
  multiply<Tile::kBranch>(Kind(), panel, tile.normal + start, Far::kPitch, acc);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int pixel = start + 8 * n + 2 * t;
    if (pixel >= Far::kPixels) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_pair(tile.hidden + (g + 8 * i) * Tile::kHiddenPitch + pixel, acc[0][n][2 * i], acc[0][n][2 * i + 1]);
    }
  }
}

// The depthwise convolution of the hidden tile, over the near window; zero outside the image. `out` and the taps begin with
// its 16 channels.
template <class Tile>
MIRAGE_DEVICE void convolve_near(const MixerArguments& p, const Corner& at, const float* taps_of, const Tile& tile,
                                 typename Tile::T* out) {
  using Near = typename Tile::Near;
  constexpr int kRun = Tile::kNearRun;
  const int thread = renewed(thread_index()), lane = thread % kLanes;
  const int line = lane / Tile::kNearRuns, start = lane % Tile::kNearRuns * kRun;
  if (lane >= Tile::kNearLanes) return;
#pragma unroll 1
  for (int i = thread / kLanes; i < 16; i += kTileWarps) {
    float taps[9], sum[kRun] = {};
    read_taps(taps_of + 12 * i, taps);
    const float* from = tile.hidden + i * Tile::kHiddenPitch + line * kHiddenLine + start;
#pragma unroll
    for (int y = 0; y < 3; ++y, from += kHiddenLine) {
      float value[kRun + 2];
#pragma unroll
      for (int j = 0; j < kRun + 2; j += 2) load_packed<2>(from + j, value + j);
#pragma unroll
      for (int x = 0; x < 3; ++x) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) sum[j] = fmaf(taps[3 * y + x], value[j + x], sum[j]);
      }
    }
    auto* to = out + i * Near::kPitch + line * Near::kLine + start;
    store_inside(p, at.row + line - 1, at.column + start - 1, sum, to, Near::kLine - start);  // the last may be shorter
  }
}

// q and k over the near window.
template <class Kind, class Tile>
MIRAGE_DEVICE void find_q_and_k(const MixerArguments& p, const Corner& at, typename Tile::Stream& stream, Tile& tile) {
#pragma unroll 1
  for (int first = 0; first < 2 * Tile::kBranch; first += 16) {
    const auto* panel = stream.next(Tile::kPanel);  // the hidden channels before have been read
    project_far<Kind, 0, Tile::Far::kTiles>(panel, tile);
    sync_block();
    auto* out = first < Tile::kBranch ? tile.q + first * Tile::Near::kPitch
                                      : tile.k + (first - Tile::kBranch) * Tile::Near::kPitch;
    convolve_near(p, at, tile.taps + 12 * first, tile, out);
  }
}

template <class Tile>
using MixerNearFragments = float[Tile::kBranch / 16][Tile::Near::kTiles][4];

// map = scale[kProduct] product + scale[kSelf] map: the gradient of q or k in place of it.
template <class Tile>
MIRAGE_DEVICE void add_scaled(const MixerArguments& p, const MixerNearFragments<Tile>& product, const float* of_product,
                              const float* of_map, typename Tile::T* map) {
  const int thread = renewed(thread_index()), g = thread % kLanes / 4, t = thread % 4;
#pragma unroll
  for (int m = 0; m < 2 * Tile::kBranch / 16; ++m) {
    const int c = 8 * m + g;
    const float factor = c < p.branch ? of_product[c] : 0.0f, own = c < p.branch ? of_map[c] : 0.0f;
#pragma unroll
    for (int n = 0; n < Tile::Near::kTiles; ++n) {
      auto* here = map + c * Tile::Near::kPitch + 8 * (thread / kLanes * Tile::Near::kTiles + n) + 2 * t;
      float value[2];
      load_packed<2>(here, value);
      store_pair(here, fmaf(factor, product[m / 2][n][m % 2 * 2], own * value[0]),
                 fmaf(factor, product[m / 2][n][m % 2 * 2 + 1], own * value[1]));
    }
  }
}

// The gradients of q and k in place of them. Each warp reads and writes its own pixels.
template <class Kind, class Tile>
MIRAGE_DEVICE void return_from_gram(const MixerBackwardArguments& p, int sample, typename Tile::Stream& stream, Tile& tile) {
  using Near = typename Tile::Near;
  const int start = 8 * Near::kTiles * (renewed(thread_index()) / kLanes);
  MixerNearFragments<Tile> of_q = {}, of_k = {};
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    multiply<16>(Kind(), stream.next(Tile::kPanel), tile.k + first * Near::kPitch + start, Near::kPitch, of_q);
  }
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const int following = (first + 16 < Tile::kBranch ? 1 : 2) * Tile::kPanel;
    multiply<16>(Kind(), stream.next(following), tile.q + first * Near::kPitch + start, Near::kPitch, of_k);
  }
  const float* scales = p.scales + int64_t(sample) * 4 * p.branch;
  sync_warp();
  add_scaled<Tile>(p, of_q, scales + kRowScale * p.branch, scales + kScaleOfQ * p.branch, tile.q);
  add_scaled<Tile>(p, of_k, scales + kColumnScale * p.branch, scales + kScaleOfK * p.branch, tile.k);
}

// The gradients of the taps of 16 channels, of whose convolution `map` has the gradient: what each run adds, added up over
// the lanes of a channel, to that of tap lane % 16.
template <class Tile>
MIRAGE_DEVICE float sum_of_taps(const typename Tile::T* map, const Tile& tile) {
  constexpr int kRun = Tile::kRun;
  const typename Tile::Run run(renewed(thread_index()));
  const auto* from = map + run.channel * Tile::Near::kPitch + (run.row + 1) * Tile::Near::kLine + run.column;
  const float* line = tile.hidden + run.channel * Tile::kHiddenPitch + (run.row + 1) * kHiddenLine + run.column;
  float grad[kRun + 2], sum[Tile::Run::kOfChannel] = {};
#pragma unroll
  for (int j = 0; j < kRun + 2; j += 2) load_packed<2>(from + j, grad + j);
#pragma unroll
  for (int y = 0; y < 3; ++y, line += kHiddenLine) {
    float value[kRun + 4];
#pragma unroll
    for (int j = 0; j < kRun + 4; j += 4) load_packed<4>(line + j, value + j);
#pragma unroll
    for (int x = 0; x < 3; ++x) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[3 * y + x] = fmaf(grad[j + 1], value[j + x + 1], sum[3 * y + x]);
    }
  }
  return sums_of_lanes<Tile::Run::kOfChannel>(sum);
}

// The gradient of those channels before the convolution, to `chunk`; zero outside the image. The taps begin with them.
template <class Tile>
MIRAGE_DEVICE void return_from_depthwise(const MixerArguments& p, const Corner& at, const float* taps_of,
                                         const typename Tile::T* map, Tile& tile) {
  constexpr int kRun = Tile::kRun;
  const typename Tile::Run run(renewed(thread_index()));
  const auto* line = map + run.channel * Tile::Near::kPitch + run.row * Tile::Near::kLine + run.column;
  float taps[9], sum[kRun] = {};
  read_taps(taps_of + 12 * run.channel, taps);
#pragma unroll
  for (int y = 0; y < 3; ++y, line += Tile::Near::kLine) {
    float grad[kRun + 2];
#pragma unroll
    for (int j = 0; j < kRun + 2; j += 2) load_packed<2>(line + j, grad + j);
#pragma unroll
    for (int x = 0; x < 3; ++x) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[j] = fmaf(taps[8 - 3 * y - x], grad[j + x], sum[j]);
    }
  }
  store_inside(p, at.row + run.row, at.column + run.column, sum, tile.chunk + run.place());
}

// 16 channels from `first` on of third `third` of q, k and v, whose gradients `map` has: the gradients of their taps and
// rows of qkv, and what they add to that of n1.
template <class Kind, class Tile>
MIRAGE_DEVICE void return_from_channels(const MixerBackwardArguments& p, const Corner& at, bool is_first, int third,
                                        int first, const typename Tile::T* map, float* sums,
                                        typename Tile::Stream& stream, Tile& tile, MixerFragments<Tile>& grad) {
  using Inner = typename Tile::Inner;
  const MixerSumsAt places(p);
  const auto* panels = stream.next(2 * Tile::kPanel);  // the chunk before has been read
  const int thread = renewed(thread_index()), channel = first + thread / 16, tap = thread % 16;
  const bool exists = channel < p.branch && tap < 9;
  float* of_tap = sums + places.taps + (third * p.branch + channel) * 9 + tap;
  const float before = exists && !is_first ? *of_tap : 0.0f;
  project_far<Kind, Tile::kMiddleFirst, Tile::kMiddleTiles>(panels, tile);
  sync_block();
  map += first * Tile::Near::kPitch;
  const float sum = sum_of_taps(map, tile);
  if (exists) *of_tap = before + sum;
  return_from_depthwise(p, at, tile.taps + 12 * (third * Tile::kBranch + first), map, tile);
  sync_block();
  multiply_inner<Kind, 16, Tile>(panels + Tile::kPanel, tile.chunk, grad);
  const int count = p.branch - first < 16 ? p.branch - first : 16, line = in_eights(p.branch);
  add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.chunk, count), tile.rows(tile.inner_normal, p.branch),
                                   sums + places.qkv + int64_t(third * p.branch + first) * line, line);
}

template <class Kind, int kBlocks, int kRows>
MIRAGE_KERNEL(256, mixer_query_blocks(kBlocks)) mixer_query_backward_kernel(const MixerBackwardArguments p) {
  using Tile = MixerQueryBackwardTile<Kind, kBlocks, kRows>;
  using T = typename Tile::T;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  TileWalk<kRows> walk(p, block_index(), p.query.blocks);
  float* sums = p.query.of_block(block_index());
  if (walk.left > 0) copy_to_block<kTileThreads>(tile.taps, mixer_backward_taps<T>(p));  // until a stream's step
#pragma unroll 1
  for (; walk.left > 0; walk.next(p)) {
    const Corner at = walk.at;
    const bool is_first = walk.is_first;
    sync_block();  // what the tile before has left is read no more
    typename Tile::Stream stream({p, at.sample}, Tile::Stream::Steps::kAll, Tile::kPanel, tile.steps);
    load_third<typename Tile::Far, kBlocks>(p, at, 0, tile.normal);
    find_q_and_k<Kind>(p, at, stream, tile);
    copy_inner<Tile>(tile.normal, tile.inner_normal);
    return_from_gram<Kind>(p, at.sample, stream, tile);
    MixerFragments<Tile> grad = {};
#pragma unroll 1
    for (int step = 0; step < 3 * kBlocks; ++step) {
      const int third = step / kBlocks;
      // In place of that of q, which has been read when its last chunk was there.
      if (step == kBlocks) load_map<typename Tile::Near, kBlocks>(p, at, p.grad_v, tile.q);
      return_from_channels<Kind>(p, at, is_first, third, 16 * (step % kBlocks), third == 1 ? tile.k : tile.q, sums, stream,
                                 tile, grad);
    }
    store_map<Tile>(p, at, grad, p.grad_n1);
  }
}

}  // namespace mirage::cuda
