// Host code: the arguments of mixer_stage's kernels, forward and backward, from the tensors of a call.
#pragma once

#include <string>

#include "common/cuda/call_checks.h"
#include "mirage/mixer_stage.h"
#include "shared.h"

namespace mirage::cuda {

inline MixerArguments mixer_sizes(const Tensor& x, int64_t heads, int64_t hidden) {
  MixerArguments p{};
  p.batch = int(x.size[0]), p.branch = int(x.size[1] / 3), p.height = int(x.size[2]), p.width = int(x.size[3]);
  p.heads = int(heads), p.hidden = int(hidden);
  return p;
}

// Why no kernel takes x, whatever its channel count; empty if one may.
inline std::string mixer_problem(const Tensor& x) {
  if (x.dtype == DType::f64) return "float64";
  for (int64_t size : {x.size[0], x.size[2], x.size[3]}) {
    if (size > INT32_MAX / 64) return "a size of " + std::to_string(size);
  }
  if ((x.size[2] + 3) / 4 * ((x.size[3] + 15) / 16) > INT32_MAX) return "so many pixels";
  if (!is_near(x)) return kFar;
  return "";
}

// All arguments but the memory that kernels write, y included. The tensors have been checked.
inline MixerArguments mixer_arguments(const Tensor& x, const MixerWeights& w, const Tensor& branch_scale,
                                      const MixerOptions& mixer, const MixerStatistics& statistics) {
  if (w.norm_weight.dtype != x.dtype) check_dtype("norm_weight", w.norm_weight, DType::f32);
  MixerArguments p = mixer_sizes(x, w.temperature.size[0], w.gic2.size[1]);
#define MIRAGE_SET_WEIGHT(name, ...)                       \
  check_dtype(#name, w.name, w.norm_weight.dtype);         \
  p.name = w.name.data;
  MIRAGE_MIXER_WEIGHTS(MIRAGE_SET_WEIGHT, MIRAGE_SET_WEIGHT, MIRAGE_SET_WEIGHT)
#undef MIRAGE_SET_WEIGHT
  p.float_weights = w.norm_weight.dtype == DType::f32;
  p.x = x.data;
  // A window begins above the first row. If there is only one row its stride may be anything, hence zero.
  const auto stride = [&](int i) { return x.size[i] > 1 ? x.stride[i] : 0; };
  p.s_batch = stride(0), p.s_channel = stride(1), p.s_row = stride(2), p.s_column = stride(3);
  p.branch_scale = branch_scale.as<const float>();
  p.eps = float(mixer.norm_eps), p.bn_eps = float(mixer.bn_eps), p.training = mixer.training;
  p.attention = statistics.attention.as<float>(), p.kernels = statistics.kernels.as<float>();
  p.branch_mean = statistics.branch_mean.as<float>();
  p.batch_mean = statistics.batch_mean.as<float>(), p.batch_var = statistics.batch_var.as<float>();
  return p;
}

}  // namespace mirage::cuda
