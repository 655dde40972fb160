#include <pybind11/stl.h>

#include "python/bind.h"
#include "python/bind_region.h"
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
  m.def("mixer_stage_sums", [](py::capsule x, const Numbers& window, const Numbers& rows, const Numbers& columns,
                               const Capsules& weights, double norm_eps, double bn_eps, py::capsule sums) {
    const Tensor tx = from_dlpack("x", x), ts = from_dlpack("sums", sums);
    const auto w = to_MixerWeights(weights);
    const Cuts across = cuts_of("columns", columns), down = cuts_of("rows", rows);
    const Window of_map = window_of(window);
    py::gil_scoped_release release;
    mixer_stage_sums(tx, of_map, down, across, w, {false, norm_eps, bn_eps}, ts);
  });
  m.def("mixer_stage_statistics", [](py::capsule sums, py::capsule pixels, const Capsules& weights, double norm_eps,
                                     double bn_eps, py::capsule attention, py::capsule kernels) {
    const Tensor ts = from_dlpack("sums", sums), tp = from_dlpack("pixels", pixels),
                 ta = from_dlpack("attention", attention), tk = from_dlpack("kernels", kernels);
    const auto w = to_MixerWeights(weights);
    py::gil_scoped_release release;
    mixer_stage_statistics(ts, tp, w, {false, norm_eps, bn_eps}, ta, tk);
  });
  m.def("mixer_stage_apply", [](py::capsule x, const Numbers& window, const Numbers& rows, const Numbers& columns,
                                const Capsules& weights, double norm_eps, double bn_eps, py::capsule attention,
                                py::capsule kernels, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), ta = from_dlpack("attention", attention),
                 tk = from_dlpack("kernels", kernels), ty = from_dlpack("y", y);
    const auto w = to_MixerWeights(weights);
    const Cuts across = cuts_of("columns", columns), down = cuts_of("rows", rows);
    const Window of_map = window_of(window);
    py::gil_scoped_release release;
    mixer_stage_apply(tx, of_map, down, across, w, {false, norm_eps, bn_eps}, ta, tk, ty);
  });
}

}  // namespace mirage::python
