// Selects the kernel instantiations of mixer_stage's backward for a channel count. CMake compiles this once per
// MIRAGE_KIND, in a source file of its own, which holds the kernels; everybody else sees the declarations only.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "backward.h"
#include "common/cuda/launch.h"
#include "common/cuda/registry.h"

#if defined(MIRAGE_KIND)
#include "backward_detail.h"
#include "backward_fusion.h"
#include "backward_gate.h"
#include "backward_input.h"
#include "backward_query.h"
#include "backward_small.h"
#endif

namespace mirage::cuda {

// Channels of a branch. The tiles of more do not fit into shared memory.
constexpr int mixer_backward_most_branch(bool is_half) { return is_half ? 80 : 64; }

struct MixerBackwardPlan {
  int tiles_of_sample;
  int fusion, gate, detail, query, input;  // thread blocks of each kernel
  int64_t shared_bytes;                    // the largest of all kernels
};

struct MixerBackwardRunner {
  MixerBackwardPlan (*plan)(const MixerArguments& arguments);
  // Launches everything but the sums over blocks. There is at least one pixel.
  void (*run)(const MixerBackwardArguments& arguments, const MixerBackwardPlan& plan, void* stream);
  void (*list)(KernelList& list);  // lists what run launches
};

// Selects the kernels for up to mixer_backward_most_branch channels of a branch: those with the most lines per tile
// that need no more than `limit` bytes of shared memory, or else those that need the least.
template <class Kind> MixerBackwardRunner mixer_backward_runner(int branch, int64_t limit);

#if defined(MIRAGE_KIND)

namespace {

template <class Kind, int kChannelTiles, int kRows>
struct MixerBackwardVariant {
  using T = typename Kind::Element;
  static constexpr int64_t kFusionBytes = sizeof(MixerFusionTile<Kind, kChannelTiles, kRows>);
  static constexpr int64_t kGateBytes = sizeof(MixerGateTile<Kind, kChannelTiles, kRows>);
  static constexpr int64_t kDetailBytes = sizeof(MixerDetailTile<Kind, kChannelTiles, kRows>);
  static constexpr int64_t kQueryBytes = sizeof(MixerQueryBackwardTile<Kind, kChannelTiles, kRows>);
  static constexpr int64_t kMostBytes = std::max({kFusionBytes, kGateBytes, kDetailBytes, kQueryBytes});
  static constexpr int64_t kNormBytes = 4096;
  static constexpr bool kHalf = kIsHalf<T>;

  static constexpr Gpu only_sm_90(bool large) { return large ? Gpu::sm_90 : Gpu::sm_80; }

  static int64_t attention_bytes(const MixerArguments& p) {
    return attention_backward_floats(p) * int64_t(sizeof(float));
  }
  static int64_t generator_bytes(const MixerArguments& p) { return generator_floats(p) * int64_t(sizeof(float)); }

  static MixerBackwardPlan plan(const MixerArguments& p) {
    MixerBackwardPlan plan{};
    plan.tiles_of_sample = Tiling<kRows>(p).of_sample;
    const int64_t tiles = int64_t(p.batch) * plan.tiles_of_sample, plane = int64_t(p.height) * p.width;
    const int64_t steps = p.batch * ((plane + kLanes - 1) / kLanes);
    const auto at_most = [](int64_t wanted, int64_t there) {
      return int(std::max<int64_t>(1, std::min(wanted, there)));
    };
    const int64_t all = multiprocessors();
    plan.fusion = at_most(mixer_fusion_blocks(kChannelTiles) * all, tiles);
    plan.gate = at_most(mixer_gate_blocks(kChannelTiles) * all, tiles);
    plan.detail = at_most(mixer_detail_blocks(kChannelTiles) * all, tiles);
    plan.query = at_most(mixer_query_blocks(kChannelTiles) * all, tiles);
    plan.input = at_most(4 * all, steps);
    plan.shared_bytes = std::max({kMostBytes, attention_bytes(p), generator_bytes(p)});
    return plan;
  }

  template <class W>
  static void run_with(const MixerBackwardArguments& p, const MixerBackwardPlan& plan, void* stream) {
    const int64_t pixels = p.batch * int64_t(p.height) * p.width;
    const int64_t prepare = 1 + MixerSteps(p).of_weights() + MixerBackwardSteps(p).weights + p.batch +
                            (pixels + kTileThreads - 1) / kTileThreads;
    launch("mixer_prepare_backward_kernel", mixer_prepare_backward_kernel<Kind, W>, {prepare, kTileThreads, 0}, stream,
           p);
    launch("mixer_fusion_backward_kernel", mixer_fusion_backward_kernel<Kind, kChannelTiles, kRows>,
           {plan.fusion, kTileThreads, kFusionBytes}, stream, p);
    launch("mixer_attention_backward_kernel", mixer_attention_backward_kernel<Kind, W>,
           {p.batch, kTileThreads, attention_bytes(p)}, stream, p, plan.tiles_of_sample);
    launch("mixer_gate_backward_kernel", mixer_gate_backward_kernel<Kind, kChannelTiles, kRows>,
           {plan.gate, kTileThreads, kGateBytes}, stream, p);
    launch("mixer_detail_backward_kernel", mixer_detail_backward_kernel<Kind, kChannelTiles, kRows>,
           {plan.detail, kTileThreads, kDetailBytes}, stream, p);
    launch("mixer_query_backward_kernel", mixer_query_backward_kernel<Kind, kChannelTiles, kRows>,
           {plan.query, kTileThreads, kQueryBytes}, stream, p);
    launch("mixer_generator_backward_kernel", mixer_generator_backward_kernel<W>,
           {p.batch, kTileThreads, generator_bytes(p)}, stream, p, plan.tiles_of_sample);
    launch("mixer_batch_norm_backward_kernel", mixer_batch_norm_backward_kernel<W>,
           {(p.branch + kTileWarps - 1) / kTileWarps, kTileThreads, 0}, stream, p);
    launch("mixer_input_backward_kernel", mixer_input_backward_kernel<T, kChannelTiles>,
           {plan.input, kTileThreads, kNormBytes}, stream, p);
  }

  static void run(const MixerBackwardArguments& p, const MixerBackwardPlan& plan, void* stream) {
    if (p.float_weights) run_with<float>(p, plan, stream);
    else run_with<T>(p, plan, stream);
  }

  template <class W>
  static void list_with(KernelList& list) {
    MixerArguments most{};
    most.branch = 16 * kChannelTiles, most.heads = 1;
    list.add<mixer_prepare_backward_kernel<Kind, W>>(kTileThreads, 0);
    list.add<mixer_attention_backward_kernel<Kind, W>>(kTileThreads, attention_bytes(most));
    list.add<mixer_generator_backward_kernel<W>>(kTileThreads, generator_bytes(most));
    list.add<mixer_batch_norm_backward_kernel<W>>(kTileThreads, 0);
  }

  static void list(KernelList& list) {
    list_with<float>(list);
    list_with<T>(list);
    list.add<mixer_fusion_backward_kernel<Kind, kChannelTiles, kRows>>(
        kTileThreads, kFusionBytes, only_sm_90(kHalf ? kRows == 8 && kChannelTiles >= 4 : kChannelTiles >= 3));
    list.add<mixer_gate_backward_kernel<Kind, kChannelTiles, kRows>>(kTileThreads, kGateBytes);
    list.add<mixer_detail_backward_kernel<Kind, kChannelTiles, kRows>>(kTileThreads, kDetailBytes,
                                                                       only_sm_90(!kHalf && kChannelTiles >= 4));
    list.add<mixer_query_backward_kernel<Kind, kChannelTiles, kRows>>(
        kTileThreads, kQueryBytes, only_sm_90(kHalf ? kRows == 8 && kChannelTiles >= 5 : kChannelTiles >= 4));
    list.add<mixer_input_backward_kernel<T, kChannelTiles>>(kTileThreads, kNormBytes);
  }

  static MixerBackwardRunner runner() { return {plan, run, list}; }
};

// Eight lines per tile if shared memory holds them: for 16-bit types one block per SM, for float, which computes
// longer, two. Four lines otherwise.
template <class Kind, int kChannelTiles>
MixerBackwardRunner mixer_backward_runner_of(int64_t limit) {
  constexpr int64_t kLeast = 163 << 10, kMost = 227 << 10;  // of a block on the oldest and on the newest GPU
  constexpr int64_t kReserved = 1024;                       // by the system, for each block
  constexpr bool kHalf = kIsHalf<typename Kind::Element>;
  using Parts = MixerBackwardVariant<Kind, kChannelTiles, 4>;
  if constexpr (kHalf || kChannelTiles == 1) {
    using Whole = MixerBackwardVariant<Kind, kChannelTiles, 8>;
    constexpr int64_t kNeeded = kHalf ? Whole::kMostBytes : 2 * Whole::kMostBytes + kReserved;
    static_assert(kNeeded <= kMost);
    if constexpr (kNeeded <= kLeast) return Whole::runner();
    else return kNeeded <= limit ? Whole::runner() : Parts::runner();
  } else {
    return Parts::runner();
  }
}

template <class Kind, int kChannelTiles = 1>
MixerBackwardRunner mixer_backward_runner_from(int branch, int64_t limit) {
  constexpr int kMost = mixer_backward_most_branch(kIsHalf<typename Kind::Element>);
  if constexpr (16 * kChannelTiles < kMost) {
    if (branch > 16 * kChannelTiles) return mixer_backward_runner_from<Kind, kChannelTiles + 1>(branch, limit);
  }
  if (branch > kMost) throw std::logic_error("no kernel takes " + std::to_string(branch) + " channels of a branch");
  return mixer_backward_runner_of<Kind, kChannelTiles>(limit);
}

}  // namespace

template <class Kind>
MixerBackwardRunner mixer_backward_runner(int branch, int64_t limit) {
  return mixer_backward_runner_from<Kind>(branch, limit);
}

template MixerBackwardRunner mixer_backward_runner<MIRAGE_KIND>(int branch, int64_t limit);

#endif

}  // namespace mirage::cuda
