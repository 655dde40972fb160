// What the feed-forward stage is given, and its weights as its kernels want them: in the order of panels (products.h), and
// what is float there as float. Each block of an image's tiles copies them as they lie; putting them into this order
// while they are loaded was a fifth of the instructions.
#pragma once

#include <algorithm>

#include "common/cuda/launch.h"
#include "common/cuda/products.h"
#include "mirage/cuda/stream.h"
#include "mirage/transformer_blocks.h"

namespace mirage::cuda {

struct FeedForwardArguments {
  const void* x;
  int64_t s_batch, s_channel, s_row, s_column;
  const void *norm_weight, *norm_bias, *project_in, *dwconv, *project_out;
  bool wide;  // the weights are float, whatever x is
  const void* packed;  // the same; forward reads these only
  void* y;             // where splits is 1
  float* partial;      // [splits, B, C, H, W] where it is more
  float eps;
  int batch, channels, pairs, height, width;
  int splits;
};

constexpr int kFeedForwardPairs = 16;  // of hidden channels, at a time

template <class T>
MIRAGE_DEVICE float weight_at(const FeedForwardArguments& p, const void* weights, int64_t index) {
  if constexpr (kIsHalf<T>) {
    if (!p.wide) return to_float(static_cast<const T*>(weights)[index]);
  }
  return static_cast<const float*>(weights)[index];
}

// The index of a hidden channel in the matrices, or -1 for those that fill up the last chunk: 16 first halves of pairs,
// then 16 second halves.
MIRAGE_DEVICE int64_t hidden_index(const FeedForwardArguments& p, int chunk, int j) {
  const int pair = kFeedForwardPairs * chunk + j % kFeedForwardPairs;
  return pair < p.pairs ? pair + int64_t(j / kFeedForwardPairs) * p.pairs : -1;
}

// ---- panels of a chunk of pairs, zero where there is no weight -----------------------------------------------------

// Element (row, k) is the weight of hidden channel `row` and channel `k`, or the other way round.
template <class Kind>
MIRAGE_DEVICE void pack_project_in(const FeedForwardArguments& p, int chunk, bool turned, int rows, int depth,
                                   typename Kind::Element* panel) {
  pack_panel<Kind, 256, 8>(panel, rows, depth, [&](int row, int k) {
    const int64_t hidden = hidden_index(p, chunk, turned ? k : row);
    const int channel = turned ? row : k;
    const bool exists = hidden >= 0 && channel < p.channels;
    return exists ? weight_at<typename Kind::Element>(p, p.project_in, hidden * p.channels + channel) : 0.0f;
  });
}

// Element (row, k) is the weight of channel `row` and pair `k`, or the other way round.
template <class Kind>
MIRAGE_DEVICE void pack_project_out(const FeedForwardArguments& p, int chunk, bool turned, int rows, int depth,
                                    typename Kind::Element* panel) {
  pack_panel<Kind, 256, 8>(panel, rows, depth, [&](int row, int k) {
    const int pair = kFeedForwardPairs * chunk + (turned ? row : k), channel = turned ? k : row;
    const bool exists = pair < p.pairs && channel < p.channels;
    return exists ? weight_at<typename Kind::Element>(p, p.project_out, int64_t(channel) * p.pairs + pair) : 0.0f;
  });
}

// Nine of each hidden channel, and three that fill up.
template <class T>
MIRAGE_DEVICE void pack_taps(const FeedForwardArguments& p, int chunk, float* taps) {
  for (int i = thread_index(); i < 2 * kFeedForwardPairs * 9; i += 256) {
    const int64_t hidden = hidden_index(p, chunk, i / 9);
    taps[i / 9 * 12 + i % 9] = hidden >= 0 ? weight_at<T>(p, p.dwconv, hidden * 9 + i % 9) : 0.0f;
  }
}

template <class Kind, int kBlocks>
struct FeedForwardPanels {
  using T = typename Kind::Element;
  static constexpr int kChannels = 16 * kBlocks;

  alignas(16) T in[2 * kFeedForwardPairs * kChannels];
  alignas(16) T out[kChannels * kFeedForwardPairs];
  alignas(16) float taps[2 * kFeedForwardPairs * 12];

  MIRAGE_DEVICE void pack(const FeedForwardArguments& p, int chunk) {
    pack_project_in<Kind>(p, chunk, false, 2 * kFeedForwardPairs, kChannels, in);
    pack_project_out<Kind>(p, chunk, false, kChannels, kFeedForwardPairs, out);
    pack_taps<T>(p, chunk, taps);
  }
};

// Backward's: `out` and `back` are of the transposed matrices.
template <class Kind, int kBlocks>
struct FeedForwardBackwardPanels {
  using T = typename Kind::Element;
  static constexpr int kChannels = 16 * kBlocks;

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

// ---- all of a stage ------------------------------------------------------------------------------------------------

template <class Panels>
struct FeedForwardPacked {
  alignas(16) float norm_weight[Panels::kChannels], norm_bias[Panels::kChannels];
  Panels chunks[1];  // or more

  static int64_t bytes(int64_t pairs) {
    const int64_t chunks = (pairs + kFeedForwardPairs - 1) / kFeedForwardPairs;
    return int64_t(sizeof(FeedForwardPacked)) + (chunks - 1) * int64_t(sizeof(Panels));
  }
};

// Several stages, whose weights are packed in one launch.
constexpr int kFeedForwardTogether = 16;

struct FeedForwardPackArguments {
  FeedForwardArguments stages[kFeedForwardTogether];
  int blocks;  // of a stage: one for each chunk, at least one
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

// ---- on the host ----------------------------------------------------------------------------------------------------

// Sizes alone.
inline FeedForwardArguments feed_forward_sizes(const Tensor& x, int64_t pairs) {
  FeedForwardArguments p{};
  p.batch = int(x.size[0]), p.channels = int(x.size[1]), p.height = int(x.size[2]), p.width = int(x.size[3]);
  p.pairs = int(pairs);
  return p;
}

// And the weights. Throws std::invalid_argument where they have not one dtype, that of x or f32.
inline FeedForwardArguments feed_forward_weights(const Tensor& x, const FeedForwardWeights& w) {
  const DType dtype = w.norm_weight.dtype;
  if (dtype != x.dtype) check_dtype("norm_weight", w.norm_weight, DType::f32);
  const auto data = [&](const char* argument, const Tensor& t) {
    check_dtype(argument, t, dtype);
    return t.data;
  };
  FeedForwardArguments p = feed_forward_sizes(x, w.project_out.size[1]);
  p.wide = dtype == DType::f32;
  p.norm_weight = data("norm_weight", w.norm_weight), p.norm_bias = data("norm_bias", w.norm_bias);
  p.project_in = data("project_in", w.project_in), p.dwconv = data("dwconv", w.dwconv);
  p.project_out = data("project_out", w.project_out);
  return p;
}

// Of `count` stages on as many channels, each to its `packed`.
template <class Panels>
void launch_pack(const FeedForwardArguments* stages, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kFeedForwardTogether) {
    FeedForwardPackArguments all{};
    const int together = int(std::min<int64_t>(count - first, kFeedForwardTogether));
    for (int i = 0; i < together; ++i) {
      all.stages[i] = stages[first + i];
      all.blocks = std::max({all.blocks, 1, (stages[first + i].pairs + kFeedForwardPairs - 1) / kFeedForwardPairs});
    }
    launch("feed_forward_pack_kernel", feed_forward_pack_kernel<Panels>, {int64_t(together) * all.blocks, 256, 0}, stream,
           all);
  }
}

// ---- the stage in two steps -----------------------------------------------------------------------------------------

// For those who pack the weights of several stages in one launch. Arguments have been checked (ops/feed_forward_stage/checks.h),
// and feed_forward_stage_problem has found nothing.

// Of the packed weights of a stage with M pairs, in steps that suit every type.
int64_t feed_forward_packed_bytes(const Tensor& x, int64_t pairs, const Options& options);

// Of the scratch memory that feed_forward_stage_packed needs.
int64_t feed_forward_packed_workspace(const Tensor& x, int64_t pairs, const Options& options);

// The weights of one stage and where they go: memory aligned to 256 bytes.
struct FeedForwardToPack {
  FeedForwardWeights weights;
  void* packed;
};

// Throws std::invalid_argument where a stage's weights have not one dtype, that of x or f32. The stages may differ in M.
void pack_feed_forward(const Tensor& x, const FeedForwardToPack* stages, int64_t count, const Options& options);

void feed_forward_stage_packed(const Tensor& x, double eps, int64_t pairs, const void* packed, const Tensor& y,
                               const Options& options);

}  // namespace mirage::cuda
