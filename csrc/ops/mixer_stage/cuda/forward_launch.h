// Selects the kernel instantiations of mixer_stage for a channel count. CMake compiles this once per MIRAGE_KIND, in a
// source file of its own, which holds the kernels; everybody else sees the declarations only.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/registry.h"
#include "finalise.h"
#include "fuse.h"
#include "reduce.h"

namespace mirage::cuda {

constexpr int kMixerChannelTiles[] = {1, 2, 3, 4, 5};  // instantiated channel counts of a branch, in sixteens
constexpr int kMixerMostBranch = 80;

struct MixerPlan {
  int64_t tiles;  // of a sample
  int parts;      // of a sample, in the first kernel
  int64_t shared_bytes;  // the largest of all kernels
  int64_t packed_bytes;
};

struct MixerRunner {
  MixerPlan (*plan)(const MixerArguments& arguments);
  void (*run)(const MixerArguments& arguments, const MixerPlan& plan, void* stream);
  void (*list)(KernelList& list);  // lists what run launches
};

// Selects the kernels for up to kMixerMostBranch channels of a branch.
template <class Kind> MixerRunner mixer_runner(int branch);

#if defined(MIRAGE_KIND)

namespace {

template <class Kind, int kChannelTiles>
struct MixerVariant {
  using T = typename Kind::Element;
  // Lines of a tile: as many as leave room for two or more blocks on an SM.
  static constexpr int kRows = kIsHalf<T> || kChannelTiles == 1 ? 8 : 4;
  static constexpr int64_t kReduceBytes = sizeof(MixerReduceTile<Kind, kChannelTiles, kRows>);
  static constexpr int64_t kFuseBytes = sizeof(MixerFuseTile<Kind, kChannelTiles, kRows>);
  static constexpr Gpu kOldestOfFuse = !kIsHalf<T> && kChannelTiles >= 4 ? Gpu::sm_90 : Gpu::sm_80;

  static int64_t finalise_bytes(const MixerArguments& p) { return finalise_floats(p) * int64_t(sizeof(float)); }

  // The maximum, reached with a single head.
  static int64_t most_finalise_bytes() {
    MixerArguments p{};
    p.branch = 16 * kChannelTiles, p.heads = 1;
    return finalise_bytes(p);
  }

  static MixerPlan plan(const MixerArguments& p) {
    const int64_t tiles = int64_t((p.width + 15) / 16) * ((p.height + kRows - 1) / kRows);
    // Parts: so many blocks per SM read x. One block per sample then reads what they leave.
    const int64_t wanted = p.batch > 0 ? (kChannelTiles == 1 ? 3 : 2) * multiprocessors() / p.batch : 1;
    const int64_t parts = wanted < tiles ? wanted : tiles;
    int64_t bytes = finalise_bytes(p);
    for (int64_t other : {kReduceBytes, kFuseBytes}) bytes = other > bytes ? other : bytes;
    return {tiles, int(parts > 1 ? parts : 1), bytes, mixer_packed_bytes(p, sizeof(T))};
  }

  template <class W>
  static void run_with(const MixerArguments& p, const MixerPlan& plan, void* stream) {
    launch("mixer_reduce_kernel", mixer_reduce_kernel<Kind, W, kChannelTiles, kRows>,
           {int64_t(p.batch) * p.parts, kTileThreads, kReduceBytes}, stream, p);
    const int blocks = 1 + (p.branch * kMixerTaps + kTileThreads - 1) / kTileThreads;
    const int64_t packing = 1 + MixerSteps(p).of_weights();
    launch("mixer_finalise_kernel", mixer_finalise_kernel<Kind, W>,
           {int64_t(p.batch) * blocks + packing, kTileThreads, finalise_bytes(p)}, stream, p, blocks);
    launch("mixer_fuse_kernel", mixer_fuse_kernel<Kind, kChannelTiles, kRows>,
           {p.batch * plan.tiles, kTileThreads, kFuseBytes}, stream, p);
  }

  static void run(const MixerArguments& p, const MixerPlan& plan, void* stream) {
    if (p.float_weights) run_with<float>(p, plan, stream);
    else run_with<T>(p, plan, stream);
  }

  template <class W>
  static void list_with(KernelList& list) {
    list.add<mixer_reduce_kernel<Kind, W, kChannelTiles, kRows>>(kTileThreads, kReduceBytes);
    list.add<mixer_finalise_kernel<Kind, W>>(kTileThreads, most_finalise_bytes());
    list.add<mixer_fuse_kernel<Kind, kChannelTiles, kRows>>(kTileThreads, kFuseBytes, kOldestOfFuse);
  }

  static void list(KernelList& list) {
    list_with<float>(list);
    list_with<T>(list);
  }
};

template <class Kind, int kIndex = 0>
MixerRunner mixer_runner_from(int branch) {
  constexpr int kChannelTiles = kMixerChannelTiles[kIndex];
  if constexpr (16 * kChannelTiles < kMixerMostBranch) {
    if (branch > 16 * kChannelTiles) return mixer_runner_from<Kind, kIndex + 1>(branch);
  }
  using Variant = MixerVariant<Kind, kChannelTiles>;
  return {Variant::plan, Variant::run, Variant::list};
}

}  // namespace

template <class Kind>
MixerRunner mixer_runner(int branch) { return mixer_runner_from<Kind>(branch); }

template MixerRunner mixer_runner<MIRAGE_KIND>(int branch);

#endif

}  // namespace mirage::cuda
