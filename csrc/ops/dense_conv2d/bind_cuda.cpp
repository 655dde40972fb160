#include "mirage/cuda/dense_conv2d.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

namespace {

Tensor weight_of(const char* name, const py::capsule& capsule) { return flattened(tensor_of(name, capsule), 3); }

}  // namespace

MIRAGE_BINDINGS(m) {
  m.def("dense_conv2d_workspace", [](py::capsule x, py::capsule weight, bool tf32) {
    return cuda::dense_conv2d_workspace(tensor_of("x", x), weight_of("weight", weight), options_of(0, tf32));
  });
  m.def("dense_conv2d", [](py::capsule x, py::capsule weight, py::capsule y, py::capsule workspace, uintptr_t stream,
                           bool tf32) {
    const Tensor tx = tensor_of("x", x), tw = weight_of("weight", weight), ty = tensor_of("y", y);
    const cuda::Options options = options_of(stream, tf32, workspace);
    py::gil_scoped_release release;
    cuda::dense_conv2d(tx, tw, ty, options);
  });
  m.def("dense_conv2d_backward_workspace", [](py::capsule grad_y, py::capsule x, py::capsule weight, bool tf32) {
    return cuda::dense_conv2d_backward_workspace(tensor_of("grad_y", grad_y), tensor_of("x", x),
                                                 weight_of("weight", weight), options_of(0, tf32));
  });
  m.def("dense_conv2d_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule weight, py::capsule grad_x, py::capsule grad_weight,
           py::capsule workspace, uintptr_t stream, bool tf32) {
          const Tensor tg = tensor_of("grad_y", grad_y), tx = tensor_of("x", x), tw = weight_of("weight", weight),
                       tgx = tensor_of("grad_x", grad_x), tgw = weight_of("grad_weight", grad_weight);
          const cuda::Options options = options_of(stream, tf32, workspace);
          py::gil_scoped_release release;
          cuda::dense_conv2d_backward(tg, tx, tw, tgx, tgw, options);
        });
}

}  // namespace mirage::python
