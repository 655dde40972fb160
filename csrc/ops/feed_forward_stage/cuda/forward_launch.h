// Selects the kernel instantiation of feed_forward_stage for a channel count. CMake compiles this once per MIRAGE_KIND,
// in a source file of its own, which holds the kernels; everybody else sees the declarations only.
#pragma once

#include "common/cuda/registry.h"
#include "forward.h"

namespace mirage::cuda {

constexpr int kFeedForwardChannelTiles[] = {2, 3, 4, 6, 8, 12, 16};  // instantiated channel counts, in sixteens
constexpr int kFeedForwardMostChannels = 256;

// How a call is split into thread blocks.
struct FeedForwardPlan {
  int64_t tiles;  // of all samples
  int64_t shared_bytes;
  int splits;
};

struct FeedForwardRunner {
  FeedForwardPlan (*plan)(const FeedForwardArguments& arguments);
  int64_t (*packed_bytes)(int64_t pairs);
  // Packs the weights of `count` stages with the same channel count, each into its `packed`.
  void (*pack)(const FeedForwardArguments* stages, int64_t count, void* stream);
  // Runs a stage whose weights are packed.
  void (*run)(const FeedForwardArguments& arguments, const FeedForwardPlan& plan, void* stream);
  void (*list)(KernelList& list);  // lists what run launches
};

// Selects the kernels for a channel count up to kFeedForwardMostChannels.
template <class Kind> FeedForwardRunner feed_forward_runner(int channels);

#if defined(MIRAGE_KIND)

namespace {

template <class Kind, int kChannelTiles>
struct FeedForwardVariant {
  static constexpr int kRows = kFeedForwardRows<Kind, kChannelTiles>;
  using Tile = FeedForwardTile<Kind, kChannelTiles, kRows>;
  using Panels = FeedForwardPanels<Kind, kChannelTiles>;
  static constexpr bool kHalf = kIsHalf<typename Kind::Element>;
  static constexpr Gpu kOldest = !kHalf && kChannelTiles > 12 ? Gpu::sm_90 : Gpu::sm_80;

  static FeedForwardPlan plan(const FeedForwardArguments& p) {
    const int64_t across = (p.width + 15) / 16, down = (p.height + kRows - 1) / kRows;
    const int64_t tiles = p.batch * down * across, chunks = (p.pairs + Tile::kPairs - 1) / Tile::kPairs;
    // As many splits as give each SM a block; one if there are no pixels or no pairs.
    const int64_t wanted = tiles > 0 ? multiprocessors() / tiles : 1;
    return {tiles, int64_t(sizeof(Tile)), int(wanted < chunks ? (wanted > 1 ? wanted : 1) : chunks > 1 ? chunks : 1)};
  }

  static int64_t packed_bytes(int64_t pairs) { return FeedForwardPacked<Panels>::bytes(pairs); }

  static void run(const FeedForwardArguments& p, const FeedForwardPlan& plan, void* stream) {
    const Grid grid{plan.tiles * plan.splits, kTileThreads, plan.shared_bytes};
    launch("feed_forward_kernel", feed_forward_kernel<Kind, kChannelTiles, kRows>, grid, stream, p);
    if (plan.splits == 1) return;
    const int64_t elements = int64_t(p.batch) * p.channels * p.height * p.width;
    launch("feed_forward_sum_kernel", feed_forward_sum_kernel<typename Tile::T>, {(elements + 255) / 256, 256, 0},
           stream, p);
  }

  static void list(KernelList& list) {
    list.add<feed_forward_pack_kernel<Panels>>(256, 0);
    list.add<feed_forward_kernel<Kind, kChannelTiles, kRows>>(kTileThreads, sizeof(Tile), kOldest);
    list.add<feed_forward_sum_kernel<typename Tile::T>>(256, 0);
  }
};

template <class Kind, int kIndex = 0>
FeedForwardRunner runner_from(int channels) {
  constexpr int kChannelTiles = kFeedForwardChannelTiles[kIndex];
  if constexpr (16 * kChannelTiles < kFeedForwardMostChannels) {
    if (channels > 16 * kChannelTiles) return runner_from<Kind, kIndex + 1>(channels);
  }
  using Variant = FeedForwardVariant<Kind, kChannelTiles>;
  return {Variant::plan, Variant::packed_bytes, launch_pack<typename Variant::Panels>, Variant::run, Variant::list};
}

}  // namespace

template <class Kind>
FeedForwardRunner feed_forward_runner(int channels) { return runner_from<Kind>(channels); }

template FeedForwardRunner feed_forward_runner<MIRAGE_KIND>(int channels);

#endif

}  // namespace mirage::cuda
