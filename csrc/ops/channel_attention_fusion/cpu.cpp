// channel_attention_fusion on the CPU: argument checks and the choice of instruction set.
#include "mirage/channel_attention_fusion.h"

#include <memory>

#include "checks.h"
#include "cpu_kernels.h"
#include "ops/channel_attention/cpu_kernels.h"

namespace mirage {
namespace cpu {
namespace {

void weights(const Tensor& q, const Tensor& k, const Tensor& temperature, const Tensor& matrices) {
  MIRAGE_DISPATCH_ISA(attention_weights(q, k, temperature, matrices));
}

void weights_backward(const double* grad_attn, const Tensor& q, const Tensor& k, const Tensor& temperature,
                      const Tensor& matrices, const Tensor& grad_q, const Tensor& grad_k,
                      const Tensor& grad_temperature) {
  MIRAGE_DISPATCH_ISA(attention_weights_backward(grad_attn, q, k, temperature, matrices, grad_q, grad_k,
                                                 grad_temperature));
}

void apply_backward(const Tensor& grad_out, const Tensor& v, const Tensor& matrices, const Tensor& conv,
                    const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                    const Tensor& grad_v, const Tensor& grad_conv, const Tensor& grad_mlp, const Tensor& grad_l_att,
                    const Tensor& grad_l_conv, const Tensor& grad_l_mlp, double* grad_attn) {
  MIRAGE_DISPATCH_ISA(channel_attention_fusion_backward(grad_out, v, matrices, conv, mlp, l_att, l_conv, l_mlp, grad_v,
                                                        grad_conv, grad_mlp, grad_l_att, grad_l_conv, grad_l_mlp,
                                                        grad_attn));
}

}  // namespace
}  // namespace cpu

void channel_attention_fusion_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                                      const Tensor& conv, const Tensor& mlp, const Tensor& l_att, const Tensor& l_conv,
                                      const Tensor& l_mlp, const Tensor& out, const Tensor& matrices) {
  check_attention_inputs(q, k, v, temperature, conv, mlp, l_att, l_conv, l_mlp, matrices);
  check_concatenated("out", out, q);
  check_contiguous("out", out);
  using namespace cpu;
  weights(q, k, temperature, matrices);
  MIRAGE_DISPATCH_ISA(channel_attention_fusion_forward(v, matrices, conv, mlp, l_att, l_conv, l_mlp, out));
}

void channel_attention_fusion_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& temperature, const Tensor& conv, const Tensor& mlp,
                                       const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                       const Tensor& matrices, const Tensor& grad_q, const Tensor& grad_k,
                                       const Tensor& grad_v, const Tensor& grad_temperature, const Tensor& grad_conv,
                                       const Tensor& grad_mlp, const Tensor& grad_l_att, const Tensor& grad_l_conv,
                                       const Tensor& grad_l_mlp) {
  check_attention_inputs(q, k, v, temperature, conv, mlp, l_att, l_conv, l_mlp, matrices);
  check_attention_gradients(grad_out, q, matrices, grad_q, grad_k, grad_v, grad_temperature, grad_conv, grad_mlp,
                            grad_l_att, grad_l_conv, grad_l_mlp);
  const int64_t d = matrices.size[3];
  const std::unique_ptr<double[]> grad_attn(new double[matrices.size[0] * matrices.size[1] * d * d]);
  cpu::apply_backward(grad_out, v, matrices, conv, mlp, l_att, l_conv, l_mlp, grad_v, grad_conv, grad_mlp, grad_l_att,
                      grad_l_conv, grad_l_mlp, grad_attn.get());
  cpu::weights_backward(grad_attn.get(), q, k, temperature, matrices, grad_q, grad_k, grad_temperature);
}

}  // namespace mirage
