// The argument checks of the stages, for every implementation, and for those who run several and must not stop between
// them.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

inline void check_feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                     const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out) {
  check_ndim("x", x, 4);
  check_ndim("project_out", project_out, 2);
  const int64_t channels = x.size[1], pairs = project_out.size[1];
  check_dense("norm_weight", norm_weight, {channels});
  check_dense("norm_bias", norm_bias, {channels});
  check_dense("project_in", project_in, {2 * pairs, channels});
  check_dense("dwconv", dwconv, {2 * pairs, 9});
  check_dense("project_out", project_out, {channels, pairs});
}

}  // namespace mirage
