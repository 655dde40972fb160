#include "bind.h"
#include "mirage/feed_forward_stage.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("feed_forward_stage",
        [](py::capsule x, py::capsule norm_weight, py::capsule norm_bias, double eps, py::capsule project_in,
           py::capsule dwconv, py::capsule project_out, py::capsule y) {
          const Tensor tx = from_dlpack("x", x), tw = from_dlpack("norm_weight", norm_weight),
                       tb = from_dlpack("norm_bias", norm_bias), ti = from_dlpack("project_in", project_in),
                       td = from_dlpack("dwconv", dwconv), to = from_dlpack("project_out", project_out),
                       ty = from_dlpack("y", y);
          py::gil_scoped_release release;
          feed_forward_stage(tx, tw, tb, eps, ti, td, to, ty);
        });
}

}  // namespace mirage::python
