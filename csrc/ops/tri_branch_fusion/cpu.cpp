// tri_branch_fusion on the CPU: argument checks and the choice of instruction set.
#include "mirage/tri_branch_fusion.h"

#include "checks.h"
#include "cpu_kernels.h"

namespace mirage {

void tri_branch_fusion_forward(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                               const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out) {
  check_tri_branch_fusion(att, conv, mlp, l_att, l_conv, l_mlp, out);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(tri_branch_fusion_forward(att, conv, mlp, l_att, l_conv, l_mlp, out));
}

void tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv, const Tensor& mlp,
                                const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp,
                                const Tensor& grad_att, const Tensor& grad_conv, const Tensor& grad_mlp,
                                const Tensor& grad_l_att, const Tensor& grad_l_conv, const Tensor& grad_l_mlp) {
  check_tri_branch_fusion_backward(grad_out, att, conv, mlp, l_att, l_conv, l_mlp, grad_att, grad_conv, grad_mlp,
                                   grad_l_att, grad_l_conv, grad_l_mlp);
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(tri_branch_fusion_backward(grad_out, att, conv, mlp, l_att, l_conv, l_mlp, grad_att, grad_conv,
                                                 grad_mlp, grad_l_att, grad_l_conv, grad_l_mlp));
}

}  // namespace mirage
