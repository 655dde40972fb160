#include <iterator>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "mirage/feed_forward_stage.h"
#include "python/bind.h"
#include "python/bind_weights.h"

namespace mirage::python {

// Numbers in any shape, as a vector.
static Tensor vector_from(const char* argument, const py::capsule& capsule) {
  const Tensor t = from_dlpack(argument, capsule);
  return {t.data, t.dtype, 1, {t.numel()}, {1}};
}

MIRAGE_BINDINGS(m) {
  // `weights`: those of each stage, then its scale, one stage after the other; None where one is absent. `eps`: one a stage.
  m.def("feed_forward_stages", [](const py::function& to_dlpack, py::capsule x, const py::sequence& weights,
                                  const std::vector<double>& eps, const std::string& norm, const std::string& activation,
                                  const std::string& gate, py::capsule y) {
    constexpr size_t kWeights = std::size(kFeedForwardWeights), kTensors = kWeights + 1;
    const size_t count = eps.size();
    if (weights.size() != count * kTensors) {
      fail("weights", std::to_string(count * kTensors) + " for " + std::to_string(count) + " stages",
           std::to_string(weights.size()));
    }
    const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y);
    const Capsules capsules = capsules_of(to_dlpack, weights);
    std::vector<FeedForward> stages;
    for (size_t i = 0; i < count; ++i) {
      const auto first = capsules.begin() + i * kTensors, scale = first + kWeights;
      stages.push_back({to_FeedForwardWeights({first, scale}),
                        {eps[i], norm_kind_of(norm), activation_of("activation", activation), activation_of("gate", gate)},
                        *scale ? vector_from("scale", **scale) : Tensor{}});
    }
    py::gil_scoped_release release;
    feed_forward_stages(tx, stages.data(), int64_t(count), ty);
  });
}

}  // namespace mirage::python
