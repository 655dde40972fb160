#include "mirage/channel_attention.h"
#include "python/bind.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("channel_attention_forward",
        [](py::capsule q, py::capsule k, py::capsule v, py::capsule temperature, py::capsule out,
           py::capsule matrices) {
          const Tensor tq = from_dlpack("q", q), tk = from_dlpack("k", k), tv = from_dlpack("v", v),
                       tt = from_dlpack("temperature", temperature), to = from_dlpack("out", out),
                       kept = from_dlpack("matrices", matrices);
          py::gil_scoped_release release;
          channel_attention_forward(tq, tk, tv, tt, to, kept);
        });
  m.def("channel_attention_backward",
        [](py::capsule grad_out, py::capsule q, py::capsule k, py::capsule v, py::capsule temperature,
           py::capsule matrices, py::capsule grad_q, py::capsule grad_k,
           py::capsule grad_v, py::capsule grad_temperature) {
          const Tensor go = from_dlpack("grad_out", grad_out), tq = from_dlpack("q", q), tk = from_dlpack("k", k),
                       tv = from_dlpack("v", v), tt = from_dlpack("temperature", temperature),
                       kept = from_dlpack("matrices", matrices), gq = from_dlpack("grad_q", grad_q),
                       gk = from_dlpack("grad_k", grad_k), gv = from_dlpack("grad_v", grad_v),
                       gt = from_dlpack("grad_temperature", grad_temperature);
          py::gil_scoped_release release;
          channel_attention_backward(go, tq, tk, tv, tt, kept, gq, gk, gv, gt);
        });
}

}  // namespace mirage::python
