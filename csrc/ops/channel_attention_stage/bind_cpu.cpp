#include "mirage/channel_attention_stage.h"
#include "python/bind.h"
#include "python/bind_weights.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  publish_ChannelAttentionWeights(m, "channel_attention_stage");
  m.def("channel_attention_stage", [](py::capsule x, const Capsules& weights, const std::string& norm, double eps,
                                      py::capsule attention, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), ta = from_dlpack("attention", attention), ty = from_dlpack("y", y);
    const auto w = to_ChannelAttentionWeights(weights);
    const NormKind kind = norm_kind_of(norm);
    py::gil_scoped_release release;
    channel_attention_stage(tx, w, kind, eps, ta, ty);
  });
  m.def("channel_attention_stage_backward", [](py::capsule grad_y, py::capsule x, const Capsules& weights,
                                               const std::string& norm, double eps, py::capsule attention,
                                               py::capsule grad_x, const Capsules& gradients) {
    const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x), ta = from_dlpack("attention", attention),
                 to = from_dlpack("grad_x", grad_x);
    const auto w = to_ChannelAttentionWeights(weights);
    const auto g = to_ChannelAttentionGradients(gradients);
    const NormKind kind = norm_kind_of(norm);
    py::gil_scoped_release release;
    channel_attention_stage_backward(tg, tx, w, kind, eps, ta, to, g);
  });
}

}  // namespace mirage::python
