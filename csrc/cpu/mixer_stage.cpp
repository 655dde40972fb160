// mixer_stage on the CPU: argument checks and the choice of instruction set.
#include "mirage/mixer_stage.h"

#include <cstring>

#include "mixer_stage_kernels.h"
#include "stage_checks.h"

namespace mirage {

void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& options,
                 const MixerStatistics& statistics, const Tensor& y) {
  check_mixer_stage(x, weights, branch_scale, statistics);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(mixer_stage(x, weights, branch_scale, options, statistics, y));
}

void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& options, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients) {
  check_mixer_stage(x, weights, branch_scale, statistics);
  check_shape("grad_y", grad_y, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("grad_y", grad_y, x.dtype);
  check_dense("grad_x", grad_x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  const struct {
    const char* name;
    const Tensor &gradient, &weight;
  } pairs[] = {{"grad_norm_weight", gradients.norm_weight, weights.norm_weight},
               {"grad_norm_bias", gradients.norm_bias, weights.norm_bias},
               {"grad_qkv", gradients.qkv, weights.qkv},
               {"grad_qkv_dwconv", gradients.qkv_dwconv, weights.qkv_dwconv},
               {"grad_temperature", gradients.temperature, weights.temperature},
               {"grad_bn_weight", gradients.bn_weight, weights.bn_weight},
               {"grad_bn_bias", gradients.bn_bias, weights.bn_bias},
               {"grad_gic1", gradients.gic1, weights.gic1},
               {"grad_generator_in", gradients.generator_in, weights.generator_in},
               {"grad_generator_out", gradients.generator_out, weights.generator_out},
               {"grad_gate_temperature", gradients.gate_temperature, weights.gate_temperature},
               {"grad_gic2", gradients.gic2, weights.gic2},
               {"grad_proj_out", gradients.proj_out, weights.proj_out},
               {"grad_mlp_in", gradients.mlp_in, weights.mlp_in},
               {"grad_mlp_out", gradients.mlp_out, weights.mlp_out},
               {"grad_alpha_att", gradients.alpha_att, weights.alpha_att},
               {"grad_alpha_conv", gradients.alpha_conv, weights.alpha_conv},
               {"grad_alpha_mlp", gradients.alpha_mlp, weights.alpha_mlp},
               {"grad_project_out", gradients.project_out, weights.project_out}};
  const DType acc = accumulator_of(x.dtype);
  for (const auto& [name, gradient, weight] : pairs) {
    const int64_t rows = weight.size[0];
    if (weight.ndim == 1) check_dense(name, gradient, acc, {rows});
    else check_dense(name, gradient, acc, {rows, weight.size[1]});
  }
  if (x.numel() == 0) {
    for (const auto& [name, gradient, weight] : pairs) {
      std::memset(gradient.data, 0, size_t(gradient.numel() * bytes_of(gradient.dtype)));
    }
    return;
  }
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(mixer_stage_backward(grad_y, x, weights, branch_scale, options, statistics, grad_x, gradients));
}

}  // namespace mirage
