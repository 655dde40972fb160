#include "mirage/cuda/channel_layer_norm.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("channel_layer_norm_forward",
        [](py::capsule x, py::capsule weight, py::capsule bias, double eps, py::capsule y, py::capsule mean,
           py::capsule rstd, uintptr_t stream) {
          const Tensor tx = tensor_of("x", x), tw = tensor_of("weight", weight), tb = tensor_of("bias", bias),
                       ty = tensor_of("y", y), tm = tensor_of("mean", mean), tr = tensor_of("rstd", rstd);
          py::gil_scoped_release release;
          cuda::channel_layer_norm_forward(tx, tw, tb, eps, ty, tm, tr, options_of(stream, false));
        });
  m.def("channel_layer_norm_backward_workspace",
        [](py::capsule x) { return cuda::channel_layer_norm_backward_workspace(tensor_of("x", x)); });
  m.def("channel_layer_norm_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule weight, py::capsule mean, py::capsule rstd,
           py::capsule grad_x, py::capsule grad_weight, py::capsule grad_bias, py::capsule workspace,
           uintptr_t stream) {
          const Tensor tg = tensor_of("grad_y", grad_y), tx = tensor_of("x", x), tw = tensor_of("weight", weight),
                       tm = tensor_of("mean", mean), tr = tensor_of("rstd", rstd), tgx = tensor_of("grad_x", grad_x),
                       tgw = tensor_of("grad_weight", grad_weight), tgb = tensor_of("grad_bias", grad_bias);
          const cuda::Options options = options_of(stream, false, workspace);
          py::gil_scoped_release release;
          cuda::channel_layer_norm_backward(tg, tx, tw, tm, tr, tgx, tgw, tgb, options);
        });
}

}  // namespace mirage::python
