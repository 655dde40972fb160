// Selects the kernel instantiations of feed_forward_stage's backward for a channel count. CMake compiles this once per
// MIRAGE_KIND, in a source file of its own, which holds the kernels; everybody else sees the declarations only.
#pragma once

#include <algorithm>

#include "backward_tile.h"
#include "common/cuda/registry.h"

#if defined(MIRAGE_KIND)
#include "backward.h"
#include "norm_gradient.h"
#endif

namespace mirage::cuda {

// The pixels of a tile with more channels do not fit into shared memory.
constexpr int feed_forward_backward_most_channels(bool is_half) { return is_half ? 240 : 96; }

// How a call is split into thread blocks, and the sizes of the arrays in its workspace, in floats.
struct FeedForwardBackwardPlan {
  int64_t tiles, shared_bytes;
  int ranges, splits, channel_tiles, groups;
  int64_t packed, chunks, sums, partial, norm_sums;

  int64_t bytes() const { return (packed + ranges * chunks * sums + partial + norm_sums) * int64_t(sizeof(float)); }
};

struct FeedForwardBackwardRunner {
  FeedForwardBackwardPlan (*plan)(const FeedForwardArguments& arguments);
  // Launches everything but the sum of the weight gradients over blocks. There is at least one pixel.
  void (*run)(const FeedForwardBackwardArguments& arguments, const FeedForwardBackwardPlan& plan, void* stream);
  void (*list)(KernelList& list);  // lists what run launches
};

// Selects the kernels for a channel count up to feed_forward_backward_most_channels: those with the most lines per tile
// that need no more than `limit` bytes of shared memory, or else those that need the least.
template <class Kind> FeedForwardBackwardRunner feed_forward_backward_runner(int channels, int64_t limit);

#if defined(MIRAGE_KIND)

namespace {

template <class Kind, int kChannelTiles, int kRows>
struct FeedForwardBackwardVariant {
  using Tile = FeedForwardBackwardTile<Kind, kChannelTiles, kRows>;
  using Panels = FeedForwardBackwardPanels<Kind, kChannelTiles>;
  using T = typename Tile::T;
  static constexpr bool kLarge =
      kIsHalf<T> ? kChannelTiles >= (kRows == 8 ? 6 : 12) : kChannelTiles >= (kRows == 8 ? 3 : 6);
  static constexpr Gpu kOldest = kLarge ? Gpu::sm_90 : Gpu::sm_80;

  static FeedForwardBackwardPlan plan(const FeedForwardArguments& p) {
    const int64_t across = (p.width + 15) / 16, down = (p.height + kRows - 1) / kRows;
    FeedForwardBackwardPlan plan{};
    plan.tiles = p.batch * down * across, plan.shared_bytes = sizeof(Tile), plan.channel_tiles = kChannelTiles;
    plan.chunks = (p.pairs + 15) / 16, plan.sums = kFeedForwardSums<kChannelTiles>;
    // One block per SM. The more blocks share a tile, the fewer keep sums of all weights, which are large if there are
    // many channels.
    const int64_t all = multiprocessors(), least = kChannelTiles >= 6 && all > 1 ? 2 : 1;
    const int64_t wanted = plan.tiles > 0 ? all / plan.tiles : 1;
    plan.splits = int(std::max<int64_t>(1, std::min(plan.chunks, std::max(wanted, least))));
    plan.ranges = int(std::min(plan.tiles, std::max<int64_t>(1, all / plan.splits)));
    const int64_t plane = int64_t(p.height) * p.width, steps = p.batch * ((plane + kLanes - 1) / kLanes);
    plan.groups = int(std::min(steps, 4 * all));
    plan.partial = plan.splits * p.batch * p.channels * plane;
    plan.norm_sums = int64_t(plan.groups) * 2 * p.channels;
    plan.packed = (FeedForwardPacked<Panels>::bytes(p.pairs) + 255) / 256 * 64;
    return plan;
  }

  static void run(const FeedForwardBackwardArguments& p, const FeedForwardBackwardPlan& plan, void* stream) {
    const FeedForwardArguments& forward = p;
    launch_pack<Panels>(&forward, 1, stream);
    launch("feed_forward_backward_kernel", feed_forward_backward_kernel<Kind, kChannelTiles, kRows>,
           {int64_t(p.ranges) * p.splits, Tile::kThreads, plan.shared_bytes}, stream, p);
    launch("feed_forward_norm_kernel", feed_forward_norm_kernel<T, kChannelTiles>, {p.groups, 256, 4096}, stream, p);
  }

  static void list(KernelList& list) {
    list.add<feed_forward_pack_kernel<Panels>>(256, 0);
    list.add<feed_forward_backward_kernel<Kind, kChannelTiles, kRows>>(Tile::kThreads, sizeof(Tile), kOldest);
    list.add<feed_forward_norm_kernel<T, kChannelTiles>>(256, 4096);
  }

  static FeedForwardBackwardRunner runner() { return {plan, run, list}; }
};

// Eight lines per tile if 227 KiB hold them; four if they do not, if this GPU may have less, or for more than 96
// channels, whose accumulators leave too few registers for the threads of eight lines.
template <class Kind, int kChannelTiles>
FeedForwardBackwardRunner runner_of(int64_t limit) {
  constexpr int64_t kLeast = 163 << 10, kMost = 227 << 10;
  constexpr int64_t kWhole = sizeof(FeedForwardBackwardTile<Kind, kChannelTiles, 8>);
  if constexpr (kChannelTiles <= 6 && kWhole <= kMost) {
    if (kWhole <= std::max(limit, kLeast)) return FeedForwardBackwardVariant<Kind, kChannelTiles, 8>::runner();
  }
  if constexpr (kChannelTiles > 6 || kWhole > kLeast)
    return FeedForwardBackwardVariant<Kind, kChannelTiles, 4>::runner();
  else return FeedForwardBackwardVariant<Kind, kChannelTiles, 8>::runner();
}

}  // namespace

template <class Kind>
FeedForwardBackwardRunner feed_forward_backward_runner(int channels, int64_t limit) {
  if (channels <= 32) return runner_of<Kind, 2>(limit);
  if (channels <= 48) return runner_of<Kind, 3>(limit);
  if (channels <= 64) return runner_of<Kind, 4>(limit);
  if (channels <= feed_forward_backward_most_channels(false)) return runner_of<Kind, 6>(limit);
  if constexpr (kIsHalf<typename Kind::Element>) {
    if (channels <= 128) return runner_of<Kind, 8>(limit);
    if (channels <= 192) return runner_of<Kind, 12>(limit);
    return runner_of<Kind, 15>(limit);
  } else {
    throw std::logic_error("no kernel takes " + std::to_string(channels) + " channels");
  }
}

template FeedForwardBackwardRunner feed_forward_backward_runner<MIRAGE_KIND>(int channels, int64_t limit);

#endif

}  // namespace mirage::cuda
