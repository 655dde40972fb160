#include "mirage/channel_attention_fusion.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("channel_attention_fusion_forward",
        [](py::capsule q, py::capsule k, py::capsule v, py::capsule temperature, py::capsule conv, py::capsule mlp,
           py::capsule l_att, py::capsule l_conv, py::capsule l_mlp, py::capsule out, py::capsule matrices) {
          const Tensor tq = from_dlpack("q", q), tk = from_dlpack("k", k), tv = from_dlpack("v", v),
                       tt = from_dlpack("temperature", temperature), tc = from_dlpack("conv", conv),
                       tm = from_dlpack("mlp", mlp), la = from_dlpack("l_att", l_att),
                       lc = from_dlpack("l_conv", l_conv), lm = from_dlpack("l_mlp", l_mlp),
                       to = from_dlpack("out", out), kept = from_dlpack("matrices", matrices);
          py::gil_scoped_release release;
          channel_attention_fusion_forward(tq, tk, tv, tt, tc, tm, la, lc, lm, to, kept);
        });
  m.def("channel_attention_fusion_backward",
        [](py::capsule grad_out, py::capsule q, py::capsule k, py::capsule v, py::capsule temperature,
           py::capsule conv, py::capsule mlp, py::capsule l_att, py::capsule l_conv, py::capsule l_mlp,
           py::capsule matrices, py::capsule grad_q, py::capsule grad_k,
           py::capsule grad_v, py::capsule grad_temperature, py::capsule grad_conv, py::capsule grad_mlp,
           py::capsule grad_l_att, py::capsule grad_l_conv, py::capsule grad_l_mlp) {
          const Tensor go = from_dlpack("grad_out", grad_out), tq = from_dlpack("q", q), tk = from_dlpack("k", k),
                       tv = from_dlpack("v", v), tt = from_dlpack("temperature", temperature),
                       tc = from_dlpack("conv", conv), tm = from_dlpack("mlp", mlp),
                       la = from_dlpack("l_att", l_att), lc = from_dlpack("l_conv", l_conv),
                       lm = from_dlpack("l_mlp", l_mlp), kept = from_dlpack("matrices", matrices),
                       gq = from_dlpack("grad_q", grad_q), gk = from_dlpack("grad_k", grad_k),
                       gv = from_dlpack("grad_v", grad_v), gt = from_dlpack("grad_temperature", grad_temperature),
                       gc = from_dlpack("grad_conv", grad_conv), gm = from_dlpack("grad_mlp", grad_mlp),
                       gla = from_dlpack("grad_l_att", grad_l_att),
                       glc = from_dlpack("grad_l_conv", grad_l_conv), glm = from_dlpack("grad_l_mlp", grad_l_mlp);
          py::gil_scoped_release release;
          channel_attention_fusion_backward(go, tq, tk, tv, tt, tc, tm, la, lc, lm, kept, gq, gk, gv, gt, gc,
                                            gm, gla, glc, glm);
        });
}

}  // namespace mirage::python
