#include "mirage/dense_conv2d.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("dense_conv2d", [](py::capsule x, py::capsule weight, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), tw = flattened(from_dlpack("weight", weight), 3), ty = from_dlpack("y", y);
    py::gil_scoped_release release;
    dense_conv2d(tx, tw, ty);
  });
  m.def("dense_conv2d_backward", [](py::capsule grad_y, py::capsule x, py::capsule weight, py::capsule grad_x,
                                    py::capsule grad_weight) {
    const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x), tw = flattened(from_dlpack("weight", weight), 3),
                 tgx = from_dlpack("grad_x", grad_x), tgw = flattened(from_dlpack("grad_weight", grad_weight), 3);
    py::gil_scoped_release release;
    dense_conv2d_backward(tg, tx, tw, tgx, tgw);
  });
}

}  // namespace mirage::python
