#include "mirage/cuda/dynamic_depthwise_conv2d.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("dynamic_depthwise_conv2d_forward", [](py::capsule x, py::capsule weight, py::capsule y, uintptr_t stream) {
    const Tensor tx = tensor_of("x", x), tw = tensor_of("weight", weight), ty = tensor_of("y", y);
    py::gil_scoped_release release;
    cuda::dynamic_depthwise_conv2d_forward(tx, tw, ty, options_of(stream, false));
  });
  m.def("dynamic_depthwise_conv2d_backward_workspace", [](py::capsule x, py::capsule weight) {
    return cuda::dynamic_depthwise_conv2d_backward_workspace(tensor_of("x", x), tensor_of("weight", weight));
  });
  m.def("dynamic_depthwise_conv2d_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule weight, py::capsule grad_x, py::capsule grad_weight,
           py::capsule workspace, uintptr_t stream) {
          const Tensor tg = tensor_of("grad_y", grad_y), tx = tensor_of("x", x), tw = tensor_of("weight", weight),
                       tgx = tensor_of("grad_x", grad_x), tgw = tensor_of("grad_weight", grad_weight);
          const cuda::Options options = options_of(stream, false, workspace);
          py::gil_scoped_release release;
          cuda::dynamic_depthwise_conv2d_backward(tg, tx, tw, tgx, tgw, options);
        });
}

}  // namespace mirage::python
