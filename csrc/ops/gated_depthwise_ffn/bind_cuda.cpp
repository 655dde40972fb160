#include "mirage/cuda/gated_depthwise_ffn.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("gated_depthwise_ffn_forward", [](py::capsule h, py::capsule weight, py::capsule y, uintptr_t stream) {
    const Tensor th = tensor_of("h", h), tw = tensor_of("weight", weight), ty = tensor_of("y", y);
    py::gil_scoped_release release;
    cuda::gated_depthwise_ffn_forward(th, tw, ty, options_of(stream, false));
  });
  m.def("gated_depthwise_ffn_backward_workspace", [](py::capsule h, py::capsule weight) {
    return cuda::gated_depthwise_ffn_backward_workspace(tensor_of("h", h), tensor_of("weight", weight));
  });
  m.def("gated_depthwise_ffn_backward",
        [](py::capsule grad_y, py::capsule h, py::capsule weight, py::capsule grad_h, py::capsule grad_weight,
           py::capsule workspace, uintptr_t stream) {
          const Tensor tg = tensor_of("grad_y", grad_y), th = tensor_of("h", h), tw = tensor_of("weight", weight),
                       tgh = tensor_of("grad_h", grad_h), tgw = tensor_of("grad_weight", grad_weight);
          const cuda::Options options = options_of(stream, false, workspace);
          py::gil_scoped_release release;
          cuda::gated_depthwise_ffn_backward(tg, th, tw, tgh, tgw, options);
        });
}

}  // namespace mirage::python
