// Launches that pack the weights of several feed-forward stages.
#pragma once

#include <algorithm>

#include "common/cuda/launch.h"
#include "pack.h"

namespace mirage::cuda {

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

}  // namespace mirage::cuda
