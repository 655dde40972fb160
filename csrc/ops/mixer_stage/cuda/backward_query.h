// Two kernels of mixer_stage's backward. The small one turns the gradient of the attention into those of q k^T, |q| and
// |k|. The other one computes the backward of these, of the depthwise convolution of q, k and v, and of qkv.
#pragma once

#include "backward_pack.h"
#include "common/cuda/sums.h"
#include "fuse.h"
#include "ops/channel_attention/cuda_softmax.h"

namespace mirage::cuda {

// ---- attention_backward --------------------------------------------------------------------------------------------

// `scales` [B, 4, c]: the divisors of the rows of the gradient of q k^T and of its transpose, and the factors of q and
// k in their own gradients.
enum MixerScale { kRowScale, kColumnScale, kScaleOfQ, kScaleOfK };

// Floats of shared memory: the gradient of the attention [c, d], later of the scores times the cosines; the gradient of
// q k^T [c, d]; and for each row the gradient of the temperature, its divisor, and the divisor in the transpose.
MIRAGE_ANYWHERE int attention_backward_buffer(const MixerArguments& p) {
  const int entries = p.branch * p.depth();
  return entries > kTileThreads ? entries : kTileThreads;  // also the buffer of sum_parts
}

MIRAGE_ANYWHERE int attention_backward_floats(const MixerArguments& p) {
  return p.branch * p.depth() + attention_backward_buffer(p) + 3 * p.branch;
}

struct MixerAttentionBuffers {
  float *grad, *gram, *grad_temperature, *row_scale, *column_scale;

  MIRAGE_DEVICE MixerAttentionBuffers(const MixerArguments& p, float* buffer)
      : grad(buffer), gram(grad + p.branch * p.depth()), grad_temperature(gram + attention_backward_buffer(p)),
        row_scale(grad_temperature + p.branch), column_scale(row_scale + p.branch) {}
};

// The statistics of a head of a sample, see finalise_attention.
struct MixerHead {
  const float *attention, *gram, *norm_q, *norm_k;

  MIRAGE_DEVICE MixerHead(const MixerArguments& p, int sample, int head)
      : attention(p.attention + (int64_t(sample) * p.heads + head) * (2 * p.depth() + 2) * p.depth()),
        gram(attention + p.depth() * p.depth()), norm_q(gram + p.depth() * p.depth()), norm_k(norm_q + p.depth()) {}
};

// The divisor of a row whose largest magnitude is `most`, so that its elements fit 16-bit types. NaN if that is not
// finite: the gradient is NaN then.
MIRAGE_DEVICE float divisor_of(float most) { return most < INFINITY ? most : NAN; }
MIRAGE_DEVICE float divided(float value, float by) { return by > 0.0f ? value / by : by == 0.0f ? 0.0f : 1.0f; }

// Softmax backward for channel i of q. One warp.
MIRAGE_DEVICE void softmax_backward(const MixerArguments& p, int sample, int i, float temperature, float* scales,
                                    const MixerAttentionBuffers& buffer) {
  const int d = p.depth(), from = i % d * d;
  const MixerHead head(p, sample, i / d);
  const float norm = head.norm_q[i % d], inverse_q = 1.0f / floored(norm);
  float *grad = buffer.grad + i * d, *gram = buffer.gram + i * d, along = 0.0f, centre = 0.0f;
  for (int j = lane_index(); j < d; j += kLanes) {
    const float attention = head.attention[from + j];
    along = fmaf(grad[j], attention, along);
    centre = fmaf(head.gram[from + j] * (inverse_q / floored(head.norm_k[j])), attention, centre);
  }
  along = warp_all_reduce_sum(along), centre = warp_all_reduce_sum(centre);
  // The gradients of a row's scores add up to zero. Their sum with the cosines is therefore that with centred cosines,
  // which is not sensitive to the rounding of `along`.
  float grad_row = 0.0f, most = 0.0f;
  for (int j = lane_index(); j < d; j += kLanes) {
    const float grad_score = head.attention[from + j] * (grad[j] - along),
                inverse = inverse_q / floored(head.norm_k[j]);
    const float cosine = head.gram[from + j] * inverse;
    gram[j] = grad_score * inverse * temperature;
    grad[j] = grad_score * cosine;
    grad_row = fmaf(grad_score, cosine - centre, grad_row);
    most = at_least(fabsf(gram[j]), most);
  }
  grad_row = warp_all_reduce_sum(grad_row), most = warp_all_reduce_max(most);
  if (lane_index() != 0) return;
  buffer.grad_temperature[i] = grad_row;
  scales[kRowScale * p.branch + i] = buffer.row_scale[i] = divisor_of(most);
  // Below the floor q is divided by a constant, so its norm has no gradient.
  scales[kScaleOfQ * p.branch + i] = norm < kNormFloor ? 0.0f : -temperature * grad_row * inverse_q * inverse_q;
}

// The gradient of the norm of channel j of k. One thread.
MIRAGE_DEVICE void k_norm_backward(const MixerArguments& p, int sample, int j, float temperature, float* scales,
                                   const MixerAttentionBuffers& buffer) {
  const int d = p.depth(), first = j / d * d * d + j % d;
  float grad_column = 0.0f, most = 0.0f;
  for (int i = 0; i < d; ++i) {
    grad_column += buffer.grad[first + i * d];
    most = at_least(fabsf(buffer.gram[first + i * d]), most);
  }
  const float norm = MixerHead(p, sample, j / d).norm_k[j % d], inverse = 1.0f / floored(norm);
  scales[kColumnScale * p.branch + j] = buffer.column_scale[j] = divisor_of(most);
  scales[kScaleOfK * p.branch + j] = norm < kNormFloor ? 0.0f : -temperature * grad_column * inverse * inverse;
}

// One block per sample, which has `tiles_of_sample` tiles in the kernel `fusion`.
template <class Kind, class W>
MIRAGE_KERNEL(256) mixer_attention_backward_kernel(const MixerBackwardArguments p, const int tiles_of_sample) {
  const MixerAttentionBuffers buffer(p, reinterpret_cast<float*>(shared_memory()));
  const int sample = int(block_index()), d = p.depth();
  const PartsOfSample parts(p.fusion, p.batch, tiles_of_sample, sample);
  sum_parts<kTileThreads>(parts.first, parts.count, parts.stride, p.branch * d, buffer.gram, buffer.grad);
  const auto temperature = p.weights<W>(p.temperature);
  float* scales = p.scales + int64_t(sample) * 4 * p.branch;
  for (int i = warp_index(); i < p.branch; i += kTileWarps) {
    softmax_backward(p, sample, i, temperature[i / d], scales, buffer);
  }
  sync_block();
  for (int j = thread_index(); j < p.branch; j += kTileThreads) {
    k_norm_backward(p, sample, j, temperature[j / d], scales, buffer);
  }
  for (int head = thread_index(); head < p.heads; head += kTileThreads) {
    float sum = 0.0f;
    for (int i = head * d; i < (head + 1) * d; ++i) sum += buffer.grad_temperature[i];
    p.grad_temperatures[int64_t(sample) * p.heads + head] = sum;
  }
  sync_block();
  pack_sample<Kind>(p, sample, 1, [&](int row, int column) {
    return divided(buffer.gram[row * d + column % d], buffer.row_scale[row]);
  });
  pack_sample<Kind>(p, sample, 2, [&](int row, int column) {
    return divided(buffer.gram[column * d + row % d], buffer.column_scale[row]);
  });
}

// ---- query ---------------------------------------------------------------------------------------------------------

// Steps: q and k; the gradient of q k^T and its transpose; q, k and v.
template <class T, int kChannelTiles>
struct MixerQuerySteps {
  static constexpr int kPanels = 2;
  static constexpr int kAll = 7 * kChannelTiles;
  const MixerBackwardArguments& p;
  int sample;

  MIRAGE_DEVICE void jump(int i, const T*& from) const {
    if (i == 0 || i == 4 * kChannelTiles) from = mixer_backward_step<T>(p, MixerBackwardSteps(p).qkv);
    if (i == 2 * kChannelTiles) from = mixer_backward_step<T>(p, MixerBackwardSteps(p).of_sample(sample, 1));
  }
};

template <class Kind, int kChannelTiles, int kRows>
struct MixerQueryBackwardTile {
  using T = typename Kind::Element;
  using Far = Window<kRows, 2>;
  using Near = Window<kRows, 1>;
  using Inner = Window<kRows, 0>;
  using Run = TileRun<Inner>;
  using Stream = PanelStream<T, kChannelTiles, MixerQuerySteps<T, kChannelTiles>>;
  static constexpr int kBranch = 16 * kChannelTiles, kPanel = 16 * kBranch;
  static constexpr int kRun = Run::kRun;  // pixels of the tile
  // q and k are convolved by one warp per channel, of which 30 lanes have a run of kNearRun pixels of the near window.
  static constexpr int kNearRun = kRows == 8 ? 6 : 4, kNearRuns = (Near::kLine + kNearRun - 1) / kNearRun;
  static constexpr int kNearLanes = (kRows + 2) * kNearRuns;
  // Pixel n of the far window has index n in its tile of hidden channels.
  static constexpr int kHiddenPitch = kRows == 8 ? 248 : 168;
  // The MMA tiles that cover the far window without its first and last line. For eight lines these are no fewer than
  // for the whole.
  static constexpr int kMiddleFirst = kRows == 8 ? 0 : 16, kMiddleTiles = kRows == 8 ? Far::kTiles : 2;
  static_assert(Far::kLine == kHiddenLine && kHiddenPitch % 16 == 8 && Far::kPixels <= kHiddenPitch);
  static_assert(kNearLanes <= kLanes && kMiddleFirst <= kHiddenLine);
  static_assert(Inner::kPixels / kRun == 16);  // threads per channel
  static_assert(kMiddleFirst + 8 * kTileWarps * kMiddleTiles >= (kRows + 3) * kHiddenLine);

  alignas(16) T normal[kBranch * Far::kPitch];         // n1
  alignas(16) T inner_normal[kBranch * Inner::kPitch];  // n1 of the tile alone
  alignas(16) T q[kBranch * Near::kPitch];              // later its gradient, then that of v
  alignas(16) T k[kBranch * Near::kPitch];              // later its gradient
  alignas(16) float hidden[16 * kHiddenPitch];          // input of the depthwise convolution
  alignas(16) T chunk[16 * Inner::kPitch];              // gradient of 16 hidden channels
  alignas(16) T steps[2][Stream::kStep];
  alignas(16) float taps[3 * kBranch * 12];

  MIRAGE_DEVICE PixelRows<T> rows(const T* map, int channels) const { return {map, Inner::kPitch, channels}; }
};

// Computes 16 channels of qkv n1 into the tile of hidden channels, from pixel kFirst of the far window on; kTiles MMA
// tiles per warp.
template <class Kind, int kFirst, int kTiles, class Tile>
MIRAGE_DEVICE void project_far(const typename Tile::T* panel, Tile& tile) {
  using Far = typename Tile::Far;
  float acc[1][kTiles][4] = {};
  const int thread = opaque(thread_index()), g = thread % kLanes / 4, t = thread % 4;
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

// Depthwise convolution of the hidden channels over the near window; zero out of bounds. `out` and the taps begin with
// the first of the 16 channels.
template <class Tile>
MIRAGE_DEVICE void convolve_near(const MixerArguments& p, const Corner& at, const float* taps_of, const Tile& tile,
                                 typename Tile::T* out) {
  using Near = typename Tile::Near;
  constexpr int kRun = Tile::kNearRun;
  const int thread = opaque(thread_index()), lane = thread % kLanes;
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
    store_in_bounds(p, at.row + line - 1, at.column + start - 1, sum, to, Near::kLine - start);  // the last is shorter
  }
}

// Recomputes q and k over the near window.
template <class Kind, class Tile>
MIRAGE_DEVICE void recompute_q_and_k(const MixerArguments& p, const Corner& at, typename Tile::Stream& stream,
                                     Tile& tile) {
#pragma unroll 1
  for (int first = 0; first < 2 * Tile::kBranch; first += 16) {
    const auto* panel = stream.next(Tile::kPanel);  // the previous hidden channels have been read
    project_far<Kind, 0, Tile::Far::kTiles>(panel, tile);
    sync_block();
    auto* out = first < Tile::kBranch ? tile.q + first * Tile::Near::kPitch
                                      : tile.k + (first - Tile::kBranch) * Tile::Near::kPitch;
    convolve_near(p, at, tile.taps + 12 * first, tile, out);
  }
}

template <class Tile>
using MixerNearFragments = float[Tile::kBranch / 16][Tile::Near::kTiles][4];

// map = of_product * product + of_map * map, with factors per channel: replaces q or k by its gradient.
template <class Tile>
MIRAGE_DEVICE void add_scaled(const MixerArguments& p, const MixerNearFragments<Tile>& product, const float* of_product,
                              const float* of_map, typename Tile::T* map) {
  const int thread = opaque(thread_index()), g = thread % kLanes / 4, t = thread % 4;
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

// Backward of q k^T: replaces q and k by their gradients. Each warp reads and writes its own pixels.
template <class Kind, class Tile>
MIRAGE_DEVICE void gram_backward(const MixerBackwardArguments& p, int sample, typename Tile::Stream& stream,
                                 Tile& tile) {
  using Near = typename Tile::Near;
  const int start = 8 * Near::kTiles * (opaque(thread_index()) / kLanes);
  MixerNearFragments<Tile> grad_q = {}, grad_k = {};
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    multiply<16>(Kind(), stream.next(Tile::kPanel), tile.k + first * Near::kPitch + start, Near::kPitch, grad_q);
  }
#pragma unroll 1
  for (int first = 0; first < Tile::kBranch; first += 16) {
    const int following = (first + 16 < Tile::kBranch ? 1 : 2) * Tile::kPanel;
    multiply<16>(Kind(), stream.next(following), tile.q + first * Near::kPitch + start, Near::kPitch, grad_k);
  }
  const float* scales = p.scales + int64_t(sample) * 4 * p.branch;
  sync_warp();
  add_scaled<Tile>(p, grad_q, scales + kRowScale * p.branch, scales + kScaleOfQ * p.branch, tile.q);
  add_scaled<Tile>(p, grad_k, scales + kColumnScale * p.branch, scales + kScaleOfK * p.branch, tile.k);
}

// Computes the gradients of the taps of 16 channels. `map` is the gradient of their convolution. The runs of a channel
// are added up across its lanes, and a thread gets the sum for tap lane % 16.
template <class Tile>
MIRAGE_DEVICE float sum_of_taps(const typename Tile::T* map, const Tile& tile) {
  constexpr int kRun = Tile::kRun;
  const typename Tile::Run run(opaque(thread_index()));
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
  return reduce_scatter_lanes<Tile::Run::kOfChannel>(sum);
}

// Depthwise backward: the gradient of the hidden channels, into `chunk`; zero out of bounds. The taps begin with the
// first of the 16 channels.
template <class Tile>
MIRAGE_DEVICE void depthwise_backward(const MixerArguments& p, const Corner& at, const float* taps_of,
                                      const typename Tile::T* map, Tile& tile) {
  constexpr int kRun = Tile::kRun;
  const typename Tile::Run run(opaque(thread_index()));
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
  store_in_bounds(p, at.row + run.row, at.column + run.column, sum, tile.chunk + run.place());
}

// Backward for 16 channels from `first` on of q, k or v (`third`), whose gradients are in `map`: the gradients of their
// taps and of their rows of qkv, and their contribution to that of n1.
template <class Kind, class Tile>
MIRAGE_DEVICE void qkv_backward_chunk(const MixerBackwardArguments& p, const Corner& at, bool is_first, int third,
                                      int first, const typename Tile::T* map, float* sums,
                                      typename Tile::Stream& stream, Tile& tile, MixerFragments<Tile>& grad) {
  using Inner = typename Tile::Inner;
  const MixerSumsAt places(p);
  const auto* panels = stream.next(2 * Tile::kPanel);  // the previous chunk has been read
  const int thread = opaque(thread_index()), channel = first + thread / 16, tap = thread % 16;
  const bool exists = channel < p.branch && tap < 9;
  float* tap_sum = sums + places.taps + (third * p.branch + channel) * 9 + tap;
  const float before = exists && !is_first ? *tap_sum : 0.0f;
  project_far<Kind, Tile::kMiddleFirst, Tile::kMiddleTiles>(panels, tile);
  sync_block();
  map += first * Tile::Near::kPitch;
  const float sum = sum_of_taps(map, tile);
  if (exists) *tap_sum = before + sum;
  depthwise_backward(p, at, tile.taps + 12 * (third * Tile::kBranch + first), map, tile);
  sync_block();
  multiply_inner<Kind, 16, Tile>(panels + Tile::kPanel, tile.chunk, grad);
  const int count = p.branch - first < 16 ? p.branch - first : 16, line = round_up_to_8(p.branch);
  add_matrix<Kind, Inner::kPixels>(is_first, tile.rows(tile.chunk, count), tile.rows(tile.inner_normal, p.branch),
                                   sums + places.qkv + int64_t(third * p.branch + first) * line, line);
}

template <class Kind, int kChannelTiles, int kRows>
MIRAGE_KERNEL(256, mixer_query_blocks(kChannelTiles)) mixer_query_backward_kernel(const MixerBackwardArguments p) {
  using Tile = MixerQueryBackwardTile<Kind, kChannelTiles, kRows>;
  using T = typename Tile::T;
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  TileWalk<kRows> walk(p, block_index(), p.query.blocks);
  float* sums = p.query.of_block(block_index());
  if (walk.left > 0)
    copy_to_block<kTileThreads>(tile.taps, mixer_backward_taps<T>(p));  // complete at a stream's first step
#pragma unroll 1
  for (; walk.left > 0; walk.next(p)) {
    const Corner at = walk.at;
    const bool is_first = walk.is_first;
    sync_block();  // all threads have finished with the previous tile
    typename Tile::Stream stream({p, at.sample}, Tile::Stream::Steps::kAll, Tile::kPanel, tile.steps);
    load_third<typename Tile::Far, kChannelTiles>(p, at, 0, tile.normal);
    recompute_q_and_k<Kind>(p, at, stream, tile);
    copy_inner<Tile>(tile.normal, tile.inner_normal);
    gram_backward<Kind>(p, at.sample, stream, tile);
    MixerFragments<Tile> grad = {};
#pragma unroll 1
    for (int step = 0; step < 3 * kChannelTiles; ++step) {
      const int third = step / kChannelTiles;
      // v's gradient replaces that of q, all chunks of which have been read.
      if (step == kChannelTiles) load_map<typename Tile::Near, kChannelTiles>(p, at, p.grad_v, tile.q);
      qkv_backward_chunk<Kind>(p, at, is_first, third, 16 * (step % kChannelTiles), third == 1 ? tile.k : tile.q, sums,
                               stream, tile, grad);
    }
    store_map<Tile>(p, at, grad, p.grad_n1);
  }
}

}  // namespace mirage::cuda
