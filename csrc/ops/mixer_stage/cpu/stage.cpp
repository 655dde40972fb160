// mixer_stage on the CPU: argument checks and the choice of instruction set.
#include "mirage/mixer_stage.h"

#include "kernels.h"
#include "ops/mixer_stage/checks.h"

namespace mirage {

void mixer_stage(const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale, const MixerOptions& options,
                 const MixerStatistics& statistics, const Tensor& y) {
  check_mixer_stage(x, weights, branch_scale, statistics);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_PRODUCTS_OF(x.dtype, mixer_stage(x, weights, branch_scale, options, statistics, y));
}

void mixer_stage_sums(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                      const MixerWeights& weights, const MixerOptions& options, const Tensor& sums) {
  check_mixer_weights(x, weights);
  check_window(x, window);
  check_cuts("rows", rows, window.height, window.row, x.size[2], 1);
  check_cuts("columns", columns, window.width, window.column, x.size[3], 1);
  const int64_t count = mixer_sums(x.size[1] / 3, weights.temperature.size[0]);
  check_dense("sums", sums, DType::f64, {x.size[0], rows.count, columns.count, count});
  if (x.size[0] == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_PRODUCTS_OF(x.dtype, mixer_stage_sums(whole_map(x, window), rows, columns, weights, options, sums));
}

void mixer_stage_statistics(const Tensor& sums, const Tensor& pixels, const MixerWeights& weights,
                            const MixerOptions& options, const Tensor& attention, const Tensor& kernels) {
  check_ndim("sums", sums, 2);
  check_ndim("norm_weight", weights.norm_weight, 1);
  Tensor x;  // of which the weights would be
  x.ndim = 4;
  x.size[1] = weights.norm_weight.size[0];
  check_mixer_weights(x, weights);
  const int64_t N = sums.size[0], c = x.size[1] / 3, heads = weights.temperature.size[0], d = c / heads;
  const DType acc = accumulator_of(attention.dtype);
  check_dense("sums", sums, DType::f64, {N, mixer_sums(c, heads)});
  check_dense("pixels", pixels, DType::f64, {N});
  check_dense("attention", attention, acc, {N, heads, 2 * d + 2, d});
  check_dense("kernels", kernels, acc, {N, c, kMixerKernelTaps});
  if (N == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(mixer_stage_statistics(sums, pixels, weights, options, attention, kernels));
}

void mixer_stage_apply(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                       const MixerWeights& weights, const MixerOptions& options, const Tensor& attention,
                       const Tensor& kernels, const Tensor& y) {
  check_mixer_weights(x, weights);
  check_window(x, window);
  check_cuts("rows", rows, window.height, window.row, x.size[2], kMixerKernelSize / 2);
  check_cuts("columns", columns, window.width, window.column, x.size[3], kMixerKernelSize / 2);
  const int64_t cells = x.size[0] * rows.count * columns.count, c = x.size[1] / 3;
  const int64_t heads = weights.temperature.size[0], d = c / heads;
  check_dense("attention", attention, accumulator_of(x.dtype), {cells, heads, 2 * d + 2, d});
  check_dense("kernels", kernels, accumulator_of(x.dtype), {cells, c, kMixerKernelTaps});
  check_lines("y", y, x.dtype, {x.size[0], x.size[1], rows.length(), columns.length()});
  if (x.size[0] == 0) return;
  using namespace cpu;
  const Tensor from = whole_map(x, window), to = whole_map(y, {window.height, window.width, rows.first(), columns.first()});
  MIRAGE_DISPATCH_PRODUCTS_OF(x.dtype, mixer_stage_apply(from, rows, columns, weights, options, attention, kernels, to));
}

void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights, const Tensor& branch_scale,
                          const MixerOptions& options, const MixerStatistics& statistics, const Tensor& grad_x,
                          const MixerGradients& gradients) {
  check_mixer_stage(x, weights, branch_scale, statistics);
  check_mixer_stage_backward(grad_y, x, weights, grad_x, gradients);
  if (x.numel() == 0) return clear_gradients(mixer_gradients(weights, gradients));
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype, mixer_stage_backward(grad_y, x, weights, branch_scale, options, statistics, grad_x,
                                                       gradients));
}

}  // namespace mirage
