#include <optional>

#include <pybind11/stl.h>

#include "mirage/cuda/transformer_blocks.h"
#include "python/bind_blocks.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  // `allocate(bytes)`: a tensor of so much scratch memory. False where it cannot be computed here.
  m.def("transformer_blocks", [](const py::function& to_dlpack, py::capsule x, const py::sequence& weights,
                                 const std::vector<double>& eps, py::capsule y, const py::function& allocate,
                                 uintptr_t stream, bool tf32) {
    const Tensor tx = tensor_of("x", x), ty = tensor_of("y", y);
    const Blocks blocks(to_dlpack, weights, eps, kDevice);
    cuda::Options options = options_of(stream, tf32);
    if (!cuda::transformer_blocks_problem(tx, blocks.data(), blocks.count(), options).empty()) return false;
    const py::capsule workspace =
        allocate(cuda::transformer_blocks_workspace(tx, blocks.data(), blocks.count(), options));
    options = options_of(stream, tf32, workspace);
    py::gil_scoped_release release;
    cuda::transformer_blocks(tx, blocks.data(), blocks.count(), ty, options);
    return true;
  });
}

}  // namespace mirage::python
