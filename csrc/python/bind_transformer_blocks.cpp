#include <pybind11/stl.h>

#include "bind.h"
#include "bind_weights.h"
#include "mirage/transformer_blocks.h"

namespace mirage::python {
namespace {

constexpr std::array<const char*, 5> kFeedForwardNames = {"norm_weight", "norm_bias", "project_in", "dwconv",
                                                          "project_out"};

constexpr size_t kWeights = kMixerNames.size() + kFeedForwardNames.size(), kEps = 3;

BlockWeights block_from(Capsules::const_iterator weights, std::vector<double>::const_iterator eps) {
  const auto second = weights + kMixerNames.size();
  const auto w = mixer_weights_from<MixerWeights>("weights", kMixerNames, {weights, second});
  auto f = from_capsules<FeedForwardWeights>("weights", kFeedForwardNames, {second, weights + kWeights});
  f.project_in = pointwise("project_in", f.project_in);
  f.dwconv = depthwise3x3("dwconv", f.dwconv);
  f.project_out = pointwise("project_out", f.project_out);
  return {w, f, eps[0], eps[1], eps[2]};
}

}  // namespace

MIRAGE_BINDINGS(m) {
  m.def("transformer_blocks", [](const py::function& to_dlpack, py::capsule x, const py::sequence& weights,
                                 const std::vector<double>& eps, py::capsule y) {
    const size_t count = eps.size() / kEps;
    if (eps.size() != count * kEps) fail("eps", "three for each block", std::to_string(eps.size()));
    if (weights.size() != count * kWeights) {
      fail("weights", std::to_string(count * kWeights) + " for " + std::to_string(count) + " blocks",
           std::to_string(weights.size()));
    }
    const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y);
    const Capsules capsules = capsules_of(to_dlpack, weights);
    std::vector<BlockWeights> blocks;
    for (size_t i = 0; i < count; ++i) {
      blocks.push_back(block_from(capsules.begin() + i * kWeights, eps.begin() + i * kEps));
    }
    py::gil_scoped_release release;
    transformer_blocks(tx, blocks.data(), int64_t(count), ty);
  });
}

}  // namespace mirage::python
