#include "mirage/spd_covariance.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("spd_covariance_forward", [](py::capsule x, double eps, py::capsule y, py::capsule mean) {
    const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y), tm = from_dlpack("mean", mean);
    py::gil_scoped_release release;
    spd_covariance_forward(tx, eps, ty, tm);
  });
  m.def("spd_covariance_backward", [](py::capsule grad_y, py::capsule x, py::capsule mean, py::capsule grad_x) {
    const Tensor tg = from_dlpack("grad_y", grad_y), tx = from_dlpack("x", x), tm = from_dlpack("mean", mean),
                 tgx = from_dlpack("grad_x", grad_x);
    py::gil_scoped_release release;
    spd_covariance_backward(tg, tx, tm, tgx);
  });
}

}  // namespace mirage::python
