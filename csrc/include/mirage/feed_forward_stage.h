// The second half of a MIRAGE block in one pass, for inference: y = x + project_out(gelu(d1) * d2) with
// d = depthwise3x3(gelu(project_in(layer_norm(x)))), d1 and d2 its halves.
#pragma once

#include "mirage/tensor.h"

namespace mirage {

//   x                       [B, C, H, W]   any strides, f32 / f64 / f16 / bf16
//   norm_weight, norm_bias  [C]            contiguous
//   project_in              [2M, C]        contiguous
//   dwconv                  [2M, 9]        contiguous
//   project_out             [C, M]         contiguous
//   y                       [B, C, H, W]   contiguous, dtype of x
// The weights are of the accumulator type of x. The hidden tensor of 2M channels exists a tile at a time, in cache.
void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out, const Tensor& y);

}  // namespace mirage
