#include <pybind11/stl.h>

#include "bind.h"
#include "bind_weights.h"
#include "mirage/transformer_block.h"

namespace mirage::python {
namespace {

constexpr std::array<const char*, 5> kFeedForwardNames = {"norm_weight", "norm_bias", "project_in", "dwconv",
                                                          "project_out"};

}  // namespace

MIRAGE_BINDINGS(m) {
  m.def("transformer_block", [](const py::function& to_dlpack, py::capsule x, const py::tuple& mixer,
                                const py::tuple& feed_forward, double norm1_eps, double bn_eps, double norm2_eps,
                                py::capsule y) {
    const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y);
    const Capsules first = capsules_of(to_dlpack, mixer), second = capsules_of(to_dlpack, feed_forward);
    const auto w = mixer_weights_from<MixerWeights>("mixer", kMixerNames, first);
    auto f = from_capsules<FeedForwardWeights>("feed_forward", kFeedForwardNames, second);
    f.project_in = pointwise("project_in", f.project_in);
    f.dwconv = depthwise3x3("dwconv", f.dwconv);
    f.project_out = pointwise("project_out", f.project_out);
    py::gil_scoped_release release;
    transformer_block(tx, w, f, {norm1_eps, bn_eps, norm2_eps}, ty);
  });
}

}  // namespace mirage::python
