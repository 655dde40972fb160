// The argument checks of the stages, for those who run several and must not stop between them.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

void check_feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                              const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out);

}  // namespace mirage
