// mixer_stage on the CPU: argument checks and the choice of instruction set.
#include "mirage/mixer_stage.h"

#include <cstring>

#include "kernels.h"
#include "ops/mixer_stage/checks.h"

namespace mirage {

void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& options,
                 const MixerStatistics& statistics, const Tensor& y) {
  check_mixer_stage(x, weights, branch_scale, statistics);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype, mixer_stage(x, weights, branch_scale, options, statistics, y));
}

void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& options, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients) {
  check_mixer_stage(x, weights, branch_scale, statistics);
  check_mixer_stage_backward(grad_y, x, weights, grad_x, gradients);
  if (x.numel() == 0) {
    for (const auto& [name, gradient, weight] : mixer_gradients(weights, gradients)) {
      std::memset(gradient.data, 0, size_t(gradient.numel() * bytes_of(gradient.dtype)));
    }
    return;
  }
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype, mixer_stage_backward(grad_y, x, weights, branch_scale, options, statistics, grad_x,
                                                       gradients));
}

}  // namespace mirage
