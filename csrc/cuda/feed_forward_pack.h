// What the feed-forward stage is given, and its weights as its kernels want them: in the order of panels (products.h), and
// what is float there as float. Each block of an image's tiles copies them as they lie; putting them into this order
// while they are loaded was a fifth of the instructions.
#pragma once

#include "products.h"

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

// Of a chunk of pairs: project_in's rows of 16 first halves, then of 16 second halves. Zero where there is no weight.
template <class Kind, int kBlocks>
struct FeedForwardPanels {
  using T = typename Kind::Element;
  static constexpr int kChannels = 16 * kBlocks;

  alignas(16) T in[2 * kFeedForwardPairs * kChannels];
  alignas(16) T out[kChannels * kFeedForwardPairs];
  alignas(16) float taps[2 * kFeedForwardPairs * 12];  // nine of each, and three that fill up
};

template <class Kind, int kBlocks>
struct FeedForwardPacked {
  alignas(16) float norm_weight[16 * kBlocks], norm_bias[16 * kBlocks];
  FeedForwardPanels<Kind, kBlocks> chunks[1];  // or more

  static int64_t bytes(int64_t pairs) {
    const int64_t chunks = (pairs + kFeedForwardPairs - 1) / kFeedForwardPairs;
    return int64_t(sizeof(FeedForwardPacked)) + (chunks - 1) * int64_t(sizeof(FeedForwardPanels<Kind, kBlocks>));
  }
};

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

// Several stages, whose weights are packed in one launch.
constexpr int kFeedForwardTogether = 16;

struct FeedForwardPackArguments {
  FeedForwardArguments stages[kFeedForwardTogether];
  int blocks;  // of a stage: one for each chunk, at least one
};

template <class Kind, int kBlocks>
MIRAGE_KERNEL(256) feed_forward_pack_kernel(const FeedForwardPackArguments all) {
  using T = typename Kind::Element;
  using Panels = FeedForwardPanels<Kind, kBlocks>;
  const FeedForwardArguments& p = all.stages[block_index() / all.blocks];
  const int chunk = int(block_index() % all.blocks), thread = thread_index();
  auto& packed = *static_cast<FeedForwardPacked<Kind, kBlocks>*>(const_cast<void*>(p.packed));
  if (chunk == 0) {
    for (int c = thread; c < Panels::kChannels; c += 256) {
      packed.norm_weight[c] = c < p.channels ? weight_at<T>(p, p.norm_weight, c) : 0.0f;
      packed.norm_bias[c] = c < p.channels ? weight_at<T>(p, p.norm_bias, c) : 0.0f;
    }
  }
  if (chunk * kFeedForwardPairs >= p.pairs) return;
  Panels& panels = packed.chunks[chunk];
  store_panel<Kind, 2 * kFeedForwardPairs, Panels::kChannels, 256>(panels.in, [&](int row, int k, float (&pair)[2]) {
    const int64_t hidden = hidden_index(p, chunk, row);
    for (int i = 0; i < Kind::kUnit; ++i) {
      pair[i] = hidden >= 0 && k + i < p.channels ? weight_at<T>(p, p.project_in, hidden * p.channels + k + i) : 0.0f;
    }
  });
  store_panel<Kind, Panels::kChannels, kFeedForwardPairs, 256>(panels.out, [&](int row, int k, float (&pair)[2]) {
    for (int i = 0; i < Kind::kUnit; ++i) {
      const int column = chunk * kFeedForwardPairs + k + i;
      const int64_t index = int64_t(row) * p.pairs + column;
      pair[i] = row < p.channels && column < p.pairs ? weight_at<T>(p, p.project_out, index) : 0.0f;
    }
  });
  for (int i = thread; i < 2 * kFeedForwardPairs * 9; i += 256) {
    const int64_t hidden = hidden_index(p, chunk, i / 9);
    panels.taps[i / 9 * 12 + i % 9] = hidden >= 0 ? weight_at<T>(p, p.dwconv, hidden * 9 + i % 9) : 0.0f;
  }
}

}  // namespace mirage::cuda
