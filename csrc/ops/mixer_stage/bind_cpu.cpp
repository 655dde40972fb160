#include <pybind11/stl.h>

#include "python/bind.h"
#include "python/bind_weights.h"

namespace mirage::python {
MIRAGE_BINDINGS(m) {
  publish_MixerWeights(m, "mixer_stage");
  publish(m, "mixer_stage_statistics", kMixerStatistics);
  m.def("mixer_stage", [](py::capsule x, const Capsules& weights, py::capsule branch_scale, bool training,
                          double norm_eps, double bn_eps, const Capsules& statistics, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), ts = from_dlpack("branch_scale", branch_scale), ty = from_dlpack("y", y);
    const auto w = to_MixerWeights(weights);
    const auto s = from_capsules<MixerStatistics>("statistics", kMixerStatistics, statistics);
    py::gil_scoped_release release;
    mixer_stage(tx, w, ts, {training, norm_eps, bn_eps}, s, ty);
  });
  m.def("mixer_stage_backward", [](py::capsule grad_y, py::capsule x, const Capsules& weights, py::capsule branch_scale,
                                   bool training, double norm_eps, double bn_eps, const Capsules& statistics,
                                   py::capsule grad_x, const Capsules& gradients) {
    const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x),
                 ts = from_dlpack("branch_scale", branch_scale), to = from_dlpack("grad_x", grad_x);
    const auto w = to_MixerWeights(weights);
    const auto s = from_capsules<MixerStatistics>("statistics", kMixerStatistics, statistics);
    const auto g = to_MixerGradients(gradients);
    py::gil_scoped_release release;
    mixer_stage_backward(tg, tx, w, ts, {training, norm_eps, bn_eps}, s, to, g);
  });
}

}  // namespace mirage::python
