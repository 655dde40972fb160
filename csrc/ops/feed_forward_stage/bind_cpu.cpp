#include <optional>
#include <string>

#include <pybind11/stl.h>

#include "mirage/feed_forward_stage.h"
#include "python/bind.h"
#include "python/bind_region.h"
#include "python/bind_weights.h"

namespace mirage::python {

static FeedForwardOptions options_from(double eps, const std::string& norm, const std::string& activation,
                                       const std::string& gate) {
  return {eps, norm_kind_of(norm), activation_of("activation", activation), activation_of("gate", gate)};
}

MIRAGE_BINDINGS(m) {
  publish_FeedForwardWeights(m, "feed_forward_stage");
  using Optional = std::optional<py::capsule>;
  m.def("feed_forward_stage", [](py::capsule x, const Capsules& weights, double eps, const std::string& norm,
                                 const std::string& activation, const std::string& gate, py::capsule y,
                                 const Optional& hidden) {
    const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y),
                 th = hidden ? from_dlpack("hidden", *hidden) : Tensor{};
    const FeedForwardWeights w = to_FeedForwardWeights(weights);
    const FeedForwardOptions options = options_from(eps, norm, activation, gate);
    py::gil_scoped_release release;
    feed_forward_stage(tx, w, options, ty, hidden ? &th : nullptr);
  });
  m.def("feed_forward_stage_backward",
        [](py::capsule grad_y, py::capsule x, const Capsules& weights, double eps, const std::string& norm,
           const std::string& activation, const std::string& gate, const Optional& hidden, py::capsule grad_x,
           const Capsules& gradients) {
          const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x),
                       tgx = from_dlpack("grad_x", grad_x), th = hidden ? from_dlpack("hidden", *hidden) : Tensor{};
          const FeedForwardWeights w = to_FeedForwardWeights(weights);
          const FeedForwardOptions options = options_from(eps, norm, activation, gate);
          const FeedForwardGradients out = to_FeedForwardGradients(gradients);
          py::gil_scoped_release release;
          feed_forward_stage_backward(tg, tx, w, options, hidden ? &th : nullptr, tgx, out);
        });
  m.def("feed_forward_stage_region",
        [](py::capsule x, const Numbers& window, const Numbers& rows, const Numbers& columns, const Capsules& weights,
           double eps, const std::string& norm, const std::string& activation, const std::string& gate, py::capsule y) {
          const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y);
          const FeedForwardWeights w = to_FeedForwardWeights(weights);
          const FeedForwardOptions options = options_from(eps, norm, activation, gate);
          const Cuts across = cuts_of("columns", columns), down = cuts_of("rows", rows);
          const Window of_map = window_of(window);
          py::gil_scoped_release release;
          feed_forward_stage_region(tx, of_map, down, across, w, options, ty);
        });
}

}  // namespace mirage::python
