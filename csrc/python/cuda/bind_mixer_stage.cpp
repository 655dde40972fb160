#include <optional>

#include <pybind11/stl.h>

#include "../bind_weights.h"
#include "cuda_tensors.h"
#include "mirage/cuda/mixer_stage.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  // Bytes of scratch memory, or None where it cannot be computed here.
  m.def("mixer_stage_workspace", [](py::capsule x, int64_t heads, int64_t hidden, bool tf32) -> std::optional<int64_t> {
    const Tensor tx = tensor_of("x", x);
    check_ndim("x", tx, 4);
    if (heads <= 0) fail("heads", "a positive number", std::to_string(heads));
    if (hidden < tx.size[1] / 3) fail("hidden", "at least a third of the channels of x", std::to_string(hidden));
    const cuda::Options options = options_of(0, tf32);
    if (!cuda::mixer_stage_problem(tx, options).empty()) return std::nullopt;
    return cuda::mixer_stage_workspace(tx, heads, hidden, options);
  });
  m.def("mixer_stage", [](py::capsule x, const Capsules& weights, py::capsule branch_scale, bool training,
                          double norm_eps, double bn_eps, const Capsules& statistics, py::capsule y,
                          py::capsule workspace, uintptr_t stream, bool tf32) {
    const Tensor tx = tensor_of("x", x), ts = tensor_of("branch_scale", branch_scale), ty = tensor_of("y", y);
    const auto w = mixer_weights_from<MixerWeights>("weights", kMixerNames, weights, kDevice);
    const auto s = from_capsules<MixerStatistics>("statistics", kMixerStatisticsNames, statistics, kDevice);
    const cuda::Options options = options_of(stream, tf32, workspace);
    py::gil_scoped_release release;
    cuda::mixer_stage(tx, w, ts, {training, norm_eps, bn_eps}, s, ty, options);
  });
}

}  // namespace mirage::python
