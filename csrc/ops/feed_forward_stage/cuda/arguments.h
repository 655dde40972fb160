// From a call's tensors to what the kernels of the feed-forward stage take.
#pragma once

#include "mirage/transformer_blocks.h"
#include "pack.h"

namespace mirage::cuda {

// Sizes alone.
inline FeedForwardArguments feed_forward_sizes(const Tensor& x, int64_t pairs) {
  FeedForwardArguments p{};
  p.batch = int(x.size[0]), p.channels = int(x.size[1]), p.height = int(x.size[2]), p.width = int(x.size[3]);
  p.pairs = int(pairs);
  return p;
}

// And the weights. Throws std::invalid_argument where they have not one dtype, that of x or f32.
inline FeedForwardArguments feed_forward_weights(const Tensor& x, const FeedForwardWeights& w) {
  const DType dtype = w.norm_weight.dtype;
  if (dtype != x.dtype) check_dtype("norm_weight", w.norm_weight, DType::f32);
  const auto data = [&](const char* argument, const Tensor& t) {
    check_dtype(argument, t, dtype);
    return t.data;
  };
  FeedForwardArguments p = feed_forward_sizes(x, w.project_out.size[1]);
  p.wide = dtype == DType::f32;
  p.norm_weight = data("norm_weight", w.norm_weight), p.norm_bias = data("norm_bias", w.norm_bias);
  p.project_in = data("project_in", w.project_in), p.dwconv = data("dwconv", w.dwconv);
  p.project_out = data("project_out", w.project_out);
  return p;
}

}  // namespace mirage::cuda
