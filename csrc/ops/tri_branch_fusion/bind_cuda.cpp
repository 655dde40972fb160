#include "mirage/cuda/tri_branch_fusion.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  define_function(m, "tri_branch_fusion_forward", cuda::tri_branch_fusion_forward,
                  std::array{"att", "conv", "mlp", "l_att", "l_conv", "l_mlp", "out"});
  m.def("tri_branch_fusion_backward_workspace",
        [](py::capsule att) { return cuda::tri_branch_fusion_backward_workspace(tensor_of("att", att)); });
  define_function(m, "tri_branch_fusion_backward", cuda::tri_branch_fusion_backward,
                  std::array{"grad_out", "att", "conv", "mlp", "l_att", "l_conv", "l_mlp", "grad_att", "grad_conv",
                             "grad_mlp", "grad_l_att", "grad_l_conv", "grad_l_mlp"});
}

}  // namespace mirage::python
