#include "mirage/tri_branch_fusion.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("tri_branch_fusion_forward",
        [](py::capsule att, py::capsule conv, py::capsule mlp, py::capsule l_att, py::capsule l_conv,
           py::capsule l_mlp, py::capsule out) {
          const Tensor ta = from_dlpack("att", att), tc = from_dlpack("conv", conv), tm = from_dlpack("mlp", mlp),
                       la = from_dlpack("l_att", l_att), lc = from_dlpack("l_conv", l_conv),
                       lm = from_dlpack("l_mlp", l_mlp), to = from_dlpack("out", out);
          py::gil_scoped_release release;
          tri_branch_fusion_forward(ta, tc, tm, la, lc, lm, to);
        });
  m.def("tri_branch_fusion_backward",
        [](py::capsule grad_out, py::capsule att, py::capsule conv, py::capsule mlp, py::capsule l_att,
           py::capsule l_conv, py::capsule l_mlp, py::capsule grad_att, py::capsule grad_conv, py::capsule grad_mlp,
           py::capsule grad_l_att, py::capsule grad_l_conv, py::capsule grad_l_mlp) {
          const Tensor go = from_dlpack("grad_out", grad_out), ta = from_dlpack("att", att),
                       tc = from_dlpack("conv", conv), tm = from_dlpack("mlp", mlp),
                       la = from_dlpack("l_att", l_att), lc = from_dlpack("l_conv", l_conv),
                       lm = from_dlpack("l_mlp", l_mlp), ga = from_dlpack("grad_att", grad_att),
                       gc = from_dlpack("grad_conv", grad_conv), gm = from_dlpack("grad_mlp", grad_mlp),
                       gla = from_dlpack("grad_l_att", grad_l_att),
                       glc = from_dlpack("grad_l_conv", grad_l_conv), glm = from_dlpack("grad_l_mlp", grad_l_mlp);
          py::gil_scoped_release release;
          tri_branch_fusion_backward(go, ta, tc, tm, la, lc, lm, ga, gc, gm, gla, glc, glm);
        });
}

}  // namespace mirage::python
