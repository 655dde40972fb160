#include "mirage/channel_layer_norm.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("channel_layer_norm_forward",
        [](py::capsule x, py::capsule weight, py::capsule bias, double eps, py::capsule y, py::capsule mean,
           py::capsule rstd) {
          const Tensor tx = from_dlpack("x", x), tw = from_dlpack("weight", weight), tb = from_dlpack("bias", bias),
                       ty = from_dlpack("y", y), tm = from_dlpack("mean", mean), tr = from_dlpack("rstd", rstd);
          py::gil_scoped_release release;
          channel_layer_norm_forward(tx, tw, tb, eps, ty, tm, tr);
        });
  m.def("channel_layer_norm_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule weight, py::capsule mean, py::capsule rstd,
           py::capsule grad_x, py::capsule grad_weight, py::capsule grad_bias) {
          const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x),
                       tw = from_dlpack("weight", weight), tm = from_dlpack("mean", mean),
                       tr = from_dlpack("rstd", rstd), tgx = from_dlpack("grad_x", grad_x),
                       tgw = from_dlpack("grad_weight", grad_weight), tgb = from_dlpack("grad_bias", grad_bias);
          py::gil_scoped_release release;
          channel_layer_norm_backward(tg, tx, tw, tm, tr, tgx, tgw, tgb);
        });
}

}  // namespace mirage::python
