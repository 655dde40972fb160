#include <optional>

#include <pybind11/stl.h>

#include "mirage/cuda/feed_forward_stage.h"
#include "python/bind_weights.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

// Bytes of scratch memory, or None where it cannot be computed here.
static void define_workspace(py::module_& m, const char* name, decltype(cuda::feed_forward_stage_problem)* problem,
                             decltype(cuda::feed_forward_stage_workspace)* workspace) {
  m.def(name, [=](py::capsule x, py::capsule project_out, bool tf32) -> std::optional<int64_t> {
    const Tensor tx = tensor_of("x", x), to = matrix_of("project_out", project_out);
    check_ndim("x", tx, 4);
    check_ndim("project_out", to, 2);
    const cuda::Options options = options_of(0, tf32);
    if (!problem(tx, to, options).empty()) return std::nullopt;
    return workspace(tx, to, options);
  });
}

MIRAGE_BINDINGS(m) {
  publish_FeedForwardWeights(m, "feed_forward_stage");
  define_workspace(m, "feed_forward_stage_workspace", cuda::feed_forward_stage_problem,
                   cuda::feed_forward_stage_workspace);
  m.def("feed_forward_stage",
        [](py::capsule x, py::capsule norm_weight, py::capsule norm_bias, double eps, py::capsule project_in,
           py::capsule dwconv, py::capsule project_out, py::capsule y, py::capsule workspace, uintptr_t stream,
           bool tf32) {
          const Tensor tx = tensor_of("x", x), tw = tensor_of("norm_weight", norm_weight),
                       tb = tensor_of("norm_bias", norm_bias), ti = matrix_of("project_in", project_in),
                       td = matrix_of("dwconv", dwconv), to = matrix_of("project_out", project_out),
                       ty = tensor_of("y", y);
          const cuda::Options options = options_of(stream, tf32, workspace);
          py::gil_scoped_release release;
          cuda::feed_forward_stage(tx, tw, tb, eps, ti, td, to, ty, options);
        });
  define_workspace(m, "feed_forward_stage_backward_workspace", cuda::feed_forward_stage_backward_problem,
                   cuda::feed_forward_stage_backward_workspace);
  m.def("feed_forward_stage_backward",
        [](py::capsule grad_y, py::capsule x, py::capsule norm_weight, py::capsule norm_bias, double eps,
           py::capsule project_in, py::capsule dwconv, py::capsule project_out, py::capsule grad_x,
           const Capsules& gradients, py::capsule workspace, uintptr_t stream, bool tf32) {
          const Tensor tg = tensor_of("grad_y", grad_y), tx = tensor_of("x", x),
                       tw = tensor_of("norm_weight", norm_weight), tb = tensor_of("norm_bias", norm_bias),
                       ti = matrix_of("project_in", project_in), td = matrix_of("dwconv", dwconv),
                       to = matrix_of("project_out", project_out), tgx = tensor_of("grad_x", grad_x);
          const FeedForwardGradients out = to_FeedForwardGradients(gradients, kDevice);
          const cuda::Options options = options_of(stream, tf32, workspace);
          py::gil_scoped_release release;
          cuda::feed_forward_stage_backward(tg, tx, tw, tb, eps, ti, td, to, tgx, out, options);
        });
}

}  // namespace mirage::python
