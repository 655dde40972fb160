#include <optional>

#include <pybind11/stl.h>

#include "mirage/feed_forward_stage.h"
#include "python/bind.h"
#include "python/bind_region.h"
#include "python/bind_weights.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  publish_FeedForwardWeights(m, "feed_forward_stage");
  using Optional = std::optional<py::capsule>;
  m.def("feed_forward_stage",
        [](py::capsule x, py::capsule norm_weight, py::capsule norm_bias, double eps, py::capsule project_in,
           py::capsule dwconv, py::capsule project_out, py::capsule y, const Optional& hidden) {
          const Tensor tx = from_dlpack("x", x), tw = from_dlpack("norm_weight", norm_weight),
                       tb = from_dlpack("norm_bias", norm_bias), ti = matrix_from_dlpack("project_in", project_in),
                       td = matrix_from_dlpack("dwconv", dwconv), to = matrix_from_dlpack("project_out", project_out),
                       ty = from_dlpack("y", y), th = hidden ? from_dlpack("hidden", *hidden) : Tensor{};
          py::gil_scoped_release release;
          feed_forward_stage(tx, tw, tb, eps, ti, td, to, ty, hidden ? &th : nullptr);
        });
  m.def("feed_forward_stage_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule norm_weight, py::capsule norm_bias, double eps,
           py::capsule project_in, py::capsule dwconv, py::capsule project_out, const Optional& hidden,
           py::capsule grad_x, const Capsules& gradients) {
          const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x),
                       tw = from_dlpack("norm_weight", norm_weight), tb = from_dlpack("norm_bias", norm_bias),
                       ti = matrix_from_dlpack("project_in", project_in), td = matrix_from_dlpack("dwconv", dwconv),
                       to = matrix_from_dlpack("project_out", project_out), tgx = from_dlpack("grad_x", grad_x),
                       th = hidden ? from_dlpack("hidden", *hidden) : Tensor{};
          const FeedForwardGradients out = to_FeedForwardGradients(gradients);
          py::gil_scoped_release release;
          feed_forward_stage_backward(tg, tx, tw, tb, eps, ti, td, to, hidden ? &th : nullptr, tgx, out);
        });
  m.def("feed_forward_stage_region", [](py::capsule x, const Numbers& window, const Numbers& rows,
                                        const Numbers& columns, const Capsules& weights, double eps, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y);
    const FeedForwardWeights w = to_FeedForwardWeights(weights);
    const Cuts across = cuts_of("columns", columns), down = cuts_of("rows", rows);
    const Window of_map = window_of(window);
    py::gil_scoped_release release;
    feed_forward_stage_region(tx, of_map, down, across, w, eps, ty);
  });
}

}  // namespace mirage::python
