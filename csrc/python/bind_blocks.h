// The weights of blocks from a list of PyTorch's tensors.
#pragma once

#include <iterator>

#include "bind_weights.h"
#include "mirage/transformer_blocks.h"

namespace mirage::python {

class Blocks {
 public:
  // `weights`: those of each block's halves, one block after the other. `eps`: three for each block.
  Blocks(const py::function& to_dlpack, const py::sequence& weights, const std::vector<double>& eps,
         int device = kDeviceCpu) {
    const size_t count = eps.size() / kEps;
    if (eps.size() != count * kEps) fail("eps", "three for each block", std::to_string(eps.size()));
    if (weights.size() != count * kWeights) {
      fail("weights", std::to_string(count * kWeights) + " for " + std::to_string(count) + " blocks",
           std::to_string(weights.size()));
    }
    capsules_ = capsules_of(to_dlpack, weights, device);
    for (size_t i = 0; i < count; ++i) {
      blocks_.push_back(block_from(capsules_.begin() + i * kWeights, eps.begin() + i * kEps, device));
    }
  }

  const BlockWeights* data() const { return blocks_.data(); }
  int64_t count() const { return int64_t(blocks_.size()); }

 private:
  static constexpr size_t kMixer = std::size(kMixerWeights), kEps = 3;
  // Of the feed-forward weights those that MIRAGE has, which are the first.
  static constexpr size_t kWeights = kMixer + least_of(kFeedForwardWeightsRequired);

  static BlockWeights block_from(Capsules::const_iterator weights, std::vector<double>::const_iterator eps, int device) {
    const auto second = weights + kMixer;
    return {to_MixerWeights({weights, second}, device), to_FeedForwardWeights({second, weights + kWeights}, device),
            eps[0], eps[1], eps[2]};
  }

  Capsules capsules_;  // which keep the tensors alive
  std::vector<BlockWeights> blocks_;
};

}  // namespace mirage::python
