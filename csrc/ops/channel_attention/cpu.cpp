// channel_attention on the CPU: argument checks and the choice of instruction set.
#include "mirage/channel_attention.h"

#include "checks.h"
#include "cpu_kernels.h"

namespace mirage {

void channel_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                               const Tensor& out, const Tensor& matrices) {
  check_channel_attention(q, k, v, temperature, out, matrices);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(channel_attention_forward(q, k, v, temperature, out, matrices));
}

void channel_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& temperature, const Tensor& matrices, const Tensor& grad_q,
                                const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_temperature) {
  check_channel_attention_backward(grad_out, q, k, v, temperature, matrices, grad_q, grad_k, grad_v, grad_temperature);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(channel_attention_backward(grad_out, q, k, v, temperature, matrices, grad_q, grad_k,
                                                 grad_v, grad_temperature));
}

}  // namespace mirage
