#include "mirage/cuda/channel_attention.h"
#include "mirage/cuda/channel_attention_fusion.h"
#include "python/cuda/cuda_tensors.h"

namespace mirage::python {

MIRAGE_BINDINGS(m) {
  m.def("channel_attention_workspace",
        [](py::capsule q, int64_t heads) { return cuda::channel_attention_workspace(tensor_of("q", q), heads); });
  m.def("channel_attention_fusion_workspace", [](py::capsule q, int64_t heads) {
    return cuda::channel_attention_fusion_workspace(tensor_of("q", q), heads);
  });
  define_function(m, "channel_attention_forward", cuda::channel_attention_forward,
                  std::array{"q", "k", "v", "temperature", "out", "matrices"});
  define_function(m, "channel_attention_backward", cuda::channel_attention_backward,
                  std::array{"grad_out", "q", "k", "v", "temperature", "matrices", "grad_q", "grad_k", "grad_v",
                             "grad_temperature"});
  define_function(m, "channel_attention_fusion_forward", cuda::channel_attention_fusion_forward,
                  std::array{"q", "k", "v", "temperature", "conv", "mlp", "l_att", "l_conv", "l_mlp", "out", "matrices"});
  define_function(m, "channel_attention_fusion_backward", cuda::channel_attention_fusion_backward,
                  std::array{"grad_out", "q", "k", "v", "temperature", "conv", "mlp", "l_att", "l_conv", "l_mlp",
                             "matrices", "grad_q", "grad_k", "grad_v", "grad_temperature", "grad_conv", "grad_mlp",
                             "grad_l_att", "grad_l_conv", "grad_l_mlp"});
}

}  // namespace mirage::python
