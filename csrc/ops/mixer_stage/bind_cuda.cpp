#include <optional>

#include <pybind11/stl.h>

#include "mirage/cuda/mixer_stage.h"
#include "python/bind_weights.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

// Bytes of scratch memory, or None where it cannot be computed here.
static void define_workspace(py::module_& m, const char* name, decltype(cuda::mixer_stage_problem)* problem,
                             decltype(cuda::mixer_stage_workspace)* workspace) {
  m.def(name, [=](py::capsule x, int64_t heads, int64_t hidden, bool tf32) -> std::optional<int64_t> {
    const Tensor tx = tensor_of("x", x);
    check_ndim("x", tx, 4);
    if (heads <= 0) fail("heads", "a positive number", std::to_string(heads));
    if (hidden < tx.size[1] / 3) fail("hidden", "at least a third of the channels of x", std::to_string(hidden));
    const cuda::Options options = options_of(0, tf32);
    if (!problem(tx, options).empty()) return std::nullopt;
    return workspace(tx, heads, hidden, options);
  });
}

MIRAGE_BINDINGS(m) {
  publish_MixerWeights(m, "mixer_stage");
  publish(m, "mixer_stage_statistics", kMixerStatistics);
  define_workspace(m, "mixer_stage_workspace", cuda::mixer_stage_problem, cuda::mixer_stage_workspace);
  m.def("mixer_stage", [](py::capsule x, const Capsules& weights, py::capsule branch_scale, bool training,
                          double norm_eps, double bn_eps, const Capsules& statistics, py::capsule y,
                          py::capsule workspace, uintptr_t stream, bool tf32) {
    const Tensor tx = tensor_of("x", x), ts = tensor_of("branch_scale", branch_scale), ty = tensor_of("y", y);
    const auto w = to_MixerWeights(weights, kDevice);
    const auto s = from_capsules<MixerStatistics>("statistics", kMixerStatistics, statistics, kDevice);
    const cuda::Options options = options_of(stream, tf32, workspace);
    py::gil_scoped_release release;
    cuda::mixer_stage(tx, w, ts, {training, norm_eps, bn_eps}, s, ty, options);
  });
  define_workspace(m, "mixer_stage_backward_workspace", cuda::mixer_stage_backward_problem,
                   cuda::mixer_stage_backward_workspace);
  m.def("mixer_stage_backward", [](py::capsule grad_y, py::capsule x, const Capsules& weights, py::capsule branch_scale,
                                   bool training, double norm_eps, double bn_eps, const Capsules& statistics,
                                   py::capsule grad_x, const Capsules& gradients, py::capsule workspace,
                                   uintptr_t stream, bool tf32) {
    const Tensor tg = tensor_of("grad_y", grad_y), tx = tensor_of("x", x), ts = tensor_of("branch_scale", branch_scale),
                 to = tensor_of("grad_x", grad_x);
    const auto w = to_MixerWeights(weights, kDevice);
    const auto s = from_capsules<MixerStatistics>("statistics", kMixerStatistics, statistics, kDevice);
    const auto g = to_MixerGradients(gradients, kDevice);
    const cuda::Options options = options_of(stream, tf32, workspace);
    py::gil_scoped_release release;
    cuda::mixer_stage_backward(tg, tx, w, ts, {training, norm_eps, bn_eps}, s, to, g, options);
  });
}

}  // namespace mirage::python
