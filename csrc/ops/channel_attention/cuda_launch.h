// Host code that channel_attention and channel_attention_fusion share: arguments, workspace, and the launches over q
// and k.
#pragma once

#include <algorithm>
#include <string>

#include "checks.h"
#include "common/cuda/tensor_views.h"
#include "cuda_kernels.h"

namespace mirage::cuda {

constexpr int kAttentionMostDepth = 64;     // channels of a head
constexpr int kAttentionSoftmaxThreads = 512;

template <int kChannelTiles_>
struct HeadChannelTiles {
  static constexpr int kChannelTiles = kChannelTiles_;
};

// Calls function(Kind(), T(), HeadChannelTiles<n>()) for d channels per head. 16-bit values are multiplied as TF32:
// they are exact in it, and the other factor keeps the range of float.
template <class Function>
void with_head(DType dtype, bool tf32, int d, Function function) {
  const auto with_channel_tiles = [&](auto kind, auto type) {
    if (d <= 16) function(kind, type, HeadChannelTiles<1>());
    else if (d <= 32) function(kind, type, HeadChannelTiles<2>());
    else function(kind, type, HeadChannelTiles<4>());
  };
  with_type(dtype, [&](auto type) {
    if constexpr (kIsHalf<decltype(type)>) with_channel_tiles(TensorCoresTf32(), type);
    else if (tf32) with_channel_tiles(TensorCoresTf32(), type);
    else with_channel_tiles(ExactFloat(), type);
  });
}

// Calls it for every combination that is instantiated.
template <class Function>
void with_every_head(Function function) {
  for (const int d : {16, 32, 64}) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) with_head(dtype, true, d, function);
    with_head(DType::f32, false, d, function);
  }
}

// Offsets of the arrays in the workspace, in floats.
struct AttentionWorkspace {
  int64_t partial, small, grad_scale, weights, total;
};

inline int attention_runs(const Tensor& q) {
  return int((q.size[2] * q.size[3] + kAttentionPixels - 1) / kAttentionPixels);
}

// Parts per head: two blocks per SM, but no more parts than runs of pixels.
inline int attention_parts(const Tensor& q, int64_t heads) {
  const int64_t all = std::max<int64_t>(1, q.size[0] * heads), wanted = (2 * multiprocessors() + all - 1) / all;
  return int(std::max<int64_t>(1, std::min<int64_t>(attention_runs(q), wanted)));
}

inline AttentionWorkspace attention_workspace(const Tensor& q, int64_t heads) {
  const int64_t d = q.size[1] / heads, all = q.size[0] * heads, parts = all * attention_parts(q, heads);
  AttentionWorkspace buffer{};
  buffer.small = buffer.partial + parts * (d * d + 2 * d);
  buffer.grad_scale = buffer.small + all * (d + 2) * d;
  buffer.weights = buffer.grad_scale + all;
  buffer.total = buffer.weights + 3 * parts;
  return buffer;
}

inline void check_heads(const Tensor& q, int64_t heads) {
  check_ndim("q", q, 4);
  if (heads < 1 || q.size[1] % heads) fail("heads", "a divisor of " + std::to_string(q.size[1]), std::to_string(heads));
}

inline std::string attention_problem(const Tensor& q, int64_t heads) {
  check_heads(q, heads);
  if (q.dtype == DType::f64) return "float64";
  const int64_t d = q.size[1] / heads;
  return d > kAttentionMostDepth ? std::to_string(d) + " channels in a head" : "";
}

inline void check_attention_problem(const char* name, const Tensor& q, const Tensor& matrices) {
  const std::string problem = attention_problem(q, matrices.size[1]);
  if (!problem.empty()) fail("q", std::string("what the CUDA kernels of ") + name + " take", problem);
}

inline AttentionArguments attention_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& temperature, const Tensor& matrices,
                                              const Options& options) {
  AttentionArguments p{};
  p.q = map_of(q), p.k = map_of(k), p.v = map_of(v);
  p.temperature = vector_of(temperature);
  p.matrices = matrices.as<float>();
  p.batch = int(q.size[0]), p.heads = int(matrices.size[1]), p.d = int(matrices.size[3]);
  p.parts = attention_parts(q, p.heads);
  const AttentionWorkspace buffer = attention_workspace(q, p.heads);
  check_workspace(options, buffer.total * int64_t(sizeof(float)));
  float* floats = static_cast<float*>(options.workspace);
  p.partial = floats + buffer.partial, p.small = floats + buffer.small, p.grad_scale = floats + buffer.grad_scale;
  return p;
}

inline Grid attention_grid(const AttentionArguments& p, int64_t shared_bytes) {
  return {int64_t(p.batch) * p.heads * p.parts, kAttentionThreads, shared_bytes};
}

// Computes `matrices` from q and k.
void attention_matrices(const Tensor& q, const Tensor& k, AttentionArguments p, const Options& options);

// Computes the gradients of q, k and temperature from the parts of attn's gradient.
void attention_matrices_backward(const Tensor& q, const Tensor& k, const Tensor& grad_q, const Tensor& grad_k,
                                 const Tensor& grad_temperature, AttentionArguments p, const Options& options);

}  // namespace mirage::cuda
