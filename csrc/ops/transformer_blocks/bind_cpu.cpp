#include <pybind11/stl.h>

#include "python/bind.h"
#include "python/bind_blocks.h"

namespace mirage::python {
MIRAGE_BINDINGS(m) {
  m.def("transformer_blocks", [](const py::function& to_dlpack, py::capsule x, const py::sequence& weights,
                                 const std::vector<double>& eps, py::capsule y) {
    const Tensor tx = from_dlpack("x", x), ty = from_dlpack("y", y);
    const Blocks blocks(to_dlpack, weights, eps);
    py::gil_scoped_release release;
    transformer_blocks(tx, blocks.data(), blocks.count(), ty);
  });
}

}  // namespace mirage::python
