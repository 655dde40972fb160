// The arguments of the feed-forward stage, and its weights in the order in which its kernels read them: matrices as
// panels (gemm.h), norm and taps as float. One launch packs them into global memory, from where each block copies them
// unchanged. Reordering them in each block took a fifth of the instructions.
#pragma once

#include <algorithm>

#include "common/cuda/launch.h"
#include "common/cuda/gemm.h"
#include "mirage/cuda/stream.h"
#include "mirage/transformer_blocks.h"

namespace mirage::cuda {

struct FeedForwardArguments {
  const void* x;
  int64_t s_batch, s_channel, s_row, s_column;
  const void *norm_weight, *norm_bias, *project_in, *dwconv, *project_out;
  bool float_weights;  // the weights are float, even if x is not
  const void* packed;  // the weights in packed form; forward reads no others
  void* y;             // written if splits is 1
  float* partial;      // [splits, B, C, H, W], written otherwise
  float eps;
  int batch, channels, pairs, height, width;
  int splits;
};

constexpr int kFeedForwardPairs = 16;  // pairs of hidden channels in a chunk

template <class T>
MIRAGE_DEVICE float weight_at(const FeedForwardArguments& p, const void* weights, int64_t index) {
  if constexpr (kIsHalf<T>) {
    if (!p.float_weights) return to_float(static_cast<const T*>(weights)[index]);
  }
  return static_cast<const float*>(weights)[index];
}

// The row of project_in for channel j of a chunk: 16 first halves of pairs, then their 16 second halves. -1 for
// channels that pad the last chunk.
MIRAGE_DEVICE int64_t hidden_index(const FeedForwardArguments& p, int chunk, int j) {
  const int pair = kFeedForwardPairs * chunk + j % kFeedForwardPairs;
  return pair < p.pairs ? pair + int64_t(j / kFeedForwardPairs) * p.pairs : -1;
}

// ---- panels of a chunk of pairs, zero where there is no weight -----------------------------------------------------

// Packs a chunk of project_in: element (row, k) is the weight of hidden channel `row` and channel `k`, or the transpose
// of that.
template <class Kind>
MIRAGE_DEVICE void pack_project_in(const FeedForwardArguments& p, int chunk, bool transposed, int rows, int depth,
                                   typename Kind::Element* panel) {
  pack_panel<Kind, 256, 8>(panel, rows, depth, [&](int row, int k) {
    const int64_t hidden = hidden_index(p, chunk, transposed ? k : row);
    const int channel = transposed ? row : k;
    const bool exists = hidden >= 0 && channel < p.channels;
    return exists ? weight_at<typename Kind::Element>(p, p.project_in, hidden * p.channels + channel) : 0.0f;
  });
}

// Packs a chunk of project_out: element (row, k) is the weight of channel `row` and pair `k`, or the transpose of that.
template <class Kind>
MIRAGE_DEVICE void pack_project_out(const FeedForwardArguments& p, int chunk, bool transposed, int rows, int depth,
                                    typename Kind::Element* panel) {
  pack_panel<Kind, 256, 8>(panel, rows, depth, [&](int row, int k) {
    const int pair = kFeedForwardPairs * chunk + (transposed ? row : k), channel = transposed ? k : row;
    const bool exists = pair < p.pairs && channel < p.channels;
    return exists ? weight_at<typename Kind::Element>(p, p.project_out, int64_t(channel) * p.pairs + pair) : 0.0f;
  });
}

// Packs the nine taps of each hidden channel, padded to twelve.
template <class T>
MIRAGE_DEVICE void pack_taps(const FeedForwardArguments& p, int chunk, float* taps) {
  for (int i = thread_index(); i < 2 * kFeedForwardPairs * 9; i += 256) {
    const int64_t hidden = hidden_index(p, chunk, i / 9);
    taps[i / 9 * 12 + i % 9] = hidden >= 0 ? weight_at<T>(p, p.dwconv, hidden * 9 + i % 9) : 0.0f;
  }
}

template <class Kind, int kChannelTiles>
struct FeedForwardPanels {
  using T = typename Kind::Element;
  static constexpr int kChannels = 16 * kChannelTiles;

  alignas(16) T in[2 * kFeedForwardPairs * kChannels];
  alignas(16) T out[kChannels * kFeedForwardPairs];
  alignas(16) float taps[2 * kFeedForwardPairs * 12];

  MIRAGE_DEVICE void pack(const FeedForwardArguments& p, int chunk) {
    pack_project_in<Kind>(p, chunk, false, 2 * kFeedForwardPairs, kChannels, in);
    pack_project_out<Kind>(p, chunk, false, kChannels, kFeedForwardPairs, out);
    pack_taps<T>(p, chunk, taps);
  }
};

// The panels of backward. `out` and `back` are of the transposed matrices.
template <class Kind, int kChannelTiles>
struct FeedForwardBackwardPanels {
  using T = typename Kind::Element;
  static constexpr int kChannels = 16 * kChannelTiles;

  alignas(16) T in[2 * kFeedForwardPairs * kChannels];
  alignas(16) T out[kFeedForwardPairs * kChannels];
  alignas(16) T back[kChannels * 2 * kFeedForwardPairs];
  alignas(16) float taps[2 * kFeedForwardPairs * 12];

  MIRAGE_DEVICE void pack(const FeedForwardArguments& p, int chunk) {
    pack_project_in<Kind>(p, chunk, false, 2 * kFeedForwardPairs, kChannels, in);
    pack_project_out<Kind>(p, chunk, true, kFeedForwardPairs, kChannels, out);
    pack_project_in<Kind>(p, chunk, true, kChannels, 2 * kFeedForwardPairs, back);
    pack_taps<T>(p, chunk, taps);
  }
};

// ---- the packed weights of a stage ---------------------------------------------------------------------------------

template <class Panels>
struct FeedForwardPacked {
  alignas(16) float norm_weight[Panels::kChannels], norm_bias[Panels::kChannels];
  Panels chunks[1];  // one or more

  static int64_t bytes(int64_t pairs) {
    const int64_t chunks = (pairs + kFeedForwardPairs - 1) / kFeedForwardPairs;
    return int64_t(sizeof(FeedForwardPacked)) + (chunks - 1) * int64_t(sizeof(Panels));
  }
};

// The number of stages whose weights one launch can pack.
constexpr int kFeedForwardTogether = 16;

struct FeedForwardPackArguments {
  FeedForwardArguments stages[kFeedForwardTogether];
  int blocks;  // thread blocks per stage: one per chunk, at least one
};

template <class Panels>
MIRAGE_KERNEL(256) feed_forward_pack_kernel(const FeedForwardPackArguments all) {
  using T = typename Panels::T;
  const FeedForwardArguments& p = all.stages[block_index() / all.blocks];
  const int chunk = int(block_index() % all.blocks);
  auto& packed = *static_cast<FeedForwardPacked<Panels>*>(const_cast<void*>(p.packed));
  if (chunk == 0) {
    for (int c = thread_index(); c < Panels::kChannels; c += 256) {
      packed.norm_weight[c] = c < p.channels ? weight_at<T>(p, p.norm_weight, c) : 0.0f;
      packed.norm_bias[c] = c < p.channels ? weight_at<T>(p, p.norm_bias, c) : 0.0f;
    }
  }
  if (chunk * kFeedForwardPairs < p.pairs) packed.chunks[chunk].pack(p, chunk);
}

// ---- host code -----------------------------------------------------------------------------------------------------

// Arguments with the sizes alone.
inline FeedForwardArguments feed_forward_sizes(const Tensor& x, int64_t pairs) {
  FeedForwardArguments p{};
  p.batch = int(x.size[0]), p.channels = int(x.size[1]), p.height = int(x.size[2]), p.width = int(x.size[3]);
  p.pairs = int(pairs);
  return p;
}

// Arguments with sizes and weights. Throws std::invalid_argument unless all weights have the same dtype, that of x or
// f32.
inline FeedForwardArguments feed_forward_weights(const Tensor& x, const FeedForwardWeights& w) {
  const DType dtype = w.norm_weight.dtype;
  if (dtype != x.dtype) check_dtype("norm_weight", w.norm_weight, DType::f32);
  const auto data = [&](const char* argument, const Tensor& t) {
    check_dtype(argument, t, dtype);
    return t.data;
  };
  FeedForwardArguments p = feed_forward_sizes(x, w.project_out.size[1]);
  p.float_weights = dtype == DType::f32;
  p.norm_weight = data("norm_weight", w.norm_weight), p.norm_bias = data("norm_bias", w.norm_bias);
  p.project_in = data("project_in", w.project_in), p.dwconv = data("dwconv", w.dwconv);
  p.project_out = data("project_out", w.project_out);
  return p;
}

// Launches the packing of `count` stages with the same channel count, each into its `packed`.
template <class Panels>
void launch_pack(const FeedForwardArguments* stages, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kFeedForwardTogether) {
    FeedForwardPackArguments all{};
    const int together = int(std::min<int64_t>(count - first, kFeedForwardTogether));
    for (int i = 0; i < together; ++i) {
      all.stages[i] = stages[first + i];
      all.blocks = std::max({all.blocks, 1, (stages[first + i].pairs + kFeedForwardPairs - 1) / kFeedForwardPairs});
    }
    launch("feed_forward_pack_kernel", feed_forward_pack_kernel<Panels>, {int64_t(together) * all.blocks, 256, 0},
           stream, all);
  }
}

// ---- the stage in two steps: packing, running ----------------------------------------------------------------------

// For callers that pack the weights of several stages in one launch. The caller has checked the arguments
// (ops/feed_forward_stage/checks.h) and that feed_forward_stage_problem finds nothing.

// Bytes of the packed weights of a stage with M pairs, a multiple of 256.
int64_t feed_forward_packed_bytes(const Tensor& x, int64_t pairs, const Options& options);

// Bytes of workspace that feed_forward_stage_packed needs.
int64_t feed_forward_packed_workspace(const Tensor& x, int64_t pairs, const Options& options);

// The weights of a stage, and the memory that they are packed into, aligned to 256 bytes.
struct FeedForwardToPack {
  FeedForwardWeights weights;
  void* packed;
};

// Throws std::invalid_argument unless the weights of each stage have the same dtype, that of x or f32. M may differ.
void pack_feed_forward(const Tensor& x, const FeedForwardToPack* stages, int64_t count, const Options& options);

void feed_forward_stage_packed(const Tensor& x, double eps, int64_t pairs, const void* packed, const Tensor& y,
                               const Options& options);

}  // namespace mirage::cuda
