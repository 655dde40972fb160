// feed_forward_stage on the CPU: argument checks and the choice of instruction set.
#include "mirage/feed_forward_stage.h"

#include "feed_forward_stage_kernels.h"

namespace mirage {

void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out, const Tensor& y) {
  check_ndim("x", x, 4);
  check_ndim("project_out", project_out, 2);
  const int64_t channels = x.size[1], hidden = project_out.size[1];
  check_shape("norm_weight", norm_weight, {channels});
  check_shape("norm_bias", norm_bias, {channels});
  check_shape("project_in", project_in, {2 * hidden, channels});
  check_shape("dwconv", dwconv, {2 * hidden, 9});
  check_shape("project_out", project_out, {channels, hidden});
  check_shape("y", y, {x.size[0], channels, x.size[2], x.size[3]});
  check_dtype("y", y, x.dtype);
  check_contiguous("y", y);
  struct { const char* name; const Tensor* t; } weights[] = {{"norm_weight", &norm_weight}, {"norm_bias", &norm_bias},
      {"project_in", &project_in}, {"dwconv", &dwconv}, {"project_out", &project_out}};
  for (auto [name, t] : weights) {
    check_dtype(name, *t, accumulator_of(x.dtype));
    check_contiguous(name, *t);
  }
  if (x.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(feed_forward_stage(x, norm_weight, norm_bias, eps, project_in, dwconv, project_out, y));
}

}  // namespace mirage
