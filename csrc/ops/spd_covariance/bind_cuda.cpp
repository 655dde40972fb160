#include "mirage/cuda/spd_covariance.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("spd_covariance_forward",
        [](py::capsule x, double eps, py::capsule y, py::capsule mean, py::capsule workspace, uintptr_t stream,
           bool tf32) {
          const Tensor tx = tensor_of("x", x), ty = tensor_of("y", y), tm = tensor_of("mean", mean);
          const cuda::Options options = options_of(stream, tf32, workspace);
          py::gil_scoped_release release;
          cuda::spd_covariance_forward(tx, eps, ty, tm, options);
        });
  m.def("spd_covariance_workspace",
        [](py::capsule x) { return cuda::spd_covariance_workspace(tensor_of("x", x)); });
  m.def("spd_covariance_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule mean, py::capsule grad_x, uintptr_t stream, bool tf32) {
          const Tensor tg = tensor_of("grad_y", grad_y), tx = tensor_of("x", x), tm = tensor_of("mean", mean),
                       tgx = tensor_of("grad_x", grad_x);
          py::gil_scoped_release release;
          cuda::spd_covariance_backward(tg, tx, tm, tgx, options_of(stream, tf32));
        });
}

}  // namespace mirage::python
