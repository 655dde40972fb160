#include "mirage/dynamic_depthwise_conv2d.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("dynamic_depthwise_conv2d_forward", [](py::capsule x, py::capsule weight, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), tw = from_dlpack("weight", weight), ty = from_dlpack("y", y);
    py::gil_scoped_release release;
    dynamic_depthwise_conv2d_forward(tx, tw, ty);
  });
  m.def("dynamic_depthwise_conv2d_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule weight, py::capsule grad_x, py::capsule grad_weight) {
          const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x),
                       tw = from_dlpack("weight", weight), tgx = from_dlpack("grad_x", grad_x),
                       tgw = from_dlpack("grad_weight", grad_weight);
          py::gil_scoped_release release;
          dynamic_depthwise_conv2d_backward(tg, tx, tw, tgx, tgw);
        });
}

}  // namespace mirage::python
