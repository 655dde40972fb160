#include "mirage/gated_depthwise_ffn.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("gated_depthwise_ffn_forward", [](py::capsule h, py::capsule weight, py::capsule y) {
    const Tensor th = from_dlpack("h", h), tw = from_dlpack("weight", weight), ty = from_dlpack("y", y);
    py::gil_scoped_release release;
    gated_depthwise_ffn_forward(th, tw, ty);
  });
  m.def("gated_depthwise_ffn_backward", [](py::capsule grad_y, py::capsule h, py::capsule weight, py::capsule grad_h,
                                           py::capsule grad_weight) {
    const Tensor tg = from_dlpack("grad_y", grad_y), th = from_dlpack("h", h), tw = from_dlpack("weight", weight),
                 tgh = from_dlpack("grad_h", grad_h), tgw = from_dlpack("grad_weight", grad_weight);
    py::gil_scoped_release release;
    gated_depthwise_ffn_backward(tg, th, tw, tgh, tgw);
  });
}

}  // namespace mirage::python
