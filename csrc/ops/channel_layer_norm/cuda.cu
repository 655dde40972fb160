// channel_layer_norm on a GPU: checks the arguments and selects the kernels.
#include "mirage/cuda/channel_layer_norm.h"

#include <algorithm>

#include "checks.h"
#include "common/cuda/registry.h"
#include "common/cuda/tensor_views.h"
#include "cuda_kernels.h"

namespace mirage::cuda {

namespace {

constexpr int kNormMostHeld = kNormOwn * kNormWarps;  // channels

bool is_held(const LayerNormArguments& p) { return p.channels <= kNormMostHeld; }

int64_t floats(int64_t count) { return count * int64_t(sizeof(float)); }

// The kernels for x of TX and y of TY, with kPack pixels per lane.
template <class TX, class TY, int kPack>
struct LayerNorm {
  static int64_t shared_bytes(int warps) { return floats(2 * kNormOwn * warps + 2 * warps * kPack * kLanes); }
  static int64_t backward_shared_bytes(int warps) { return floats(kNormOwn * warps + 4 * warps * kPack * kLanes); }

  static void forward(const LayerNormArguments& p, void* stream) {
    const int64_t tiles = norm_tiles<kPack>(p);
    if (is_held(p)) {
      launch("layer_norm_kernel", layer_norm_kernel<TX, TY, kPack>,
             {tiles, p.warps * kLanes, shared_bytes(p.warps)}, stream, p);
    } else if constexpr (kPack == 1) {
      launch("layer_norm_rereading_kernel", layer_norm_rereading_kernel<TX, TY>,
             {tiles, kNormWarps * kLanes, floats(2 * kNormWarps * kLanes)}, stream, p);
    }
  }

  static void backward(LayerNormArguments p, void* stream) {
    const int64_t tiles = norm_tiles<kPack>(p);
    p.parts = int(std::min<int64_t>(p.parts, tiles));
    const Grid grid{int64_t(p.parts) * p.slices, p.warps * kLanes, backward_shared_bytes(p.warps)};
    if (is_held(p)) {
      launch("layer_norm_backward_kernel", layer_norm_backward_kernel<TX, TY, kPack, true>, grid, stream, p);
    } else if constexpr (kPack == 1) {
      launch("layer_norm_along_kernel", layer_norm_along_kernel<TX, TY>,
             {tiles, kNormWarps * kLanes, floats(2 * kNormWarps * kLanes)}, stream, p);
      launch("layer_norm_backward_kernel", layer_norm_backward_kernel<TX, TY, 1, false>, grid, stream, p);
    }
    sum(p, stream);
  }

  // Computes the gradients of weight and bias; zero if there are no parts.
  static void sum(const LayerNormArguments& p, void* stream) {
    const int64_t blocks = (2 * int64_t(p.channels) + kLanes - 1) / kLanes;
    launch("layer_norm_sum_kernel", layer_norm_sum_kernel,
           {blocks, kNormWarps * kLanes, floats(kNormWarps * kLanes)}, stream, p);
  }

  static void list(KernelList& list) {
    const int threads = kNormWarps * kLanes;
    list.add<layer_norm_kernel<TX, TY, kPack>>(threads, shared_bytes(kNormWarps));
    list.add<layer_norm_backward_kernel<TX, TY, kPack, true>>(threads, backward_shared_bytes(kNormWarps));
    if constexpr (kPack == 1) {
      list.add<layer_norm_rereading_kernel<TX, TY>>(threads, floats(2 * kNormWarps * kLanes));
      list.add<layer_norm_along_kernel<TX, TY>>(threads, floats(2 * kNormWarps * kLanes));
      list.add<layer_norm_backward_kernel<TX, TY, 1, false>>(threads, backward_shared_bytes(kNormWarps));
    }
  }
};

// `pairs`: whether lanes take two 16-bit pixels each.
template <class TX, class TY, class Function>
void with_pack(bool pairs, Function function) {
  if constexpr (kIsHalf<TX>) {
    if (pairs) return function(LayerNorm<TX, TY, 2>());
  }
  function(LayerNorm<TX, TY, 1>());
}

template <class Function>
void with_kernels(DType x, DType y, bool pairs, Function function) {
  if (x == DType::f32) return with_pack<float, float>(pairs, function);
  if (x == DType::f16) {
    return y == x ? with_pack<f16, f16>(pairs, function) : with_pack<f16, float>(pairs, function);
  }
  return y == x ? with_pack<bf16, bf16>(pairs, function) : with_pack<bf16, float>(pairs, function);
}

LayerNormArguments arguments_of(const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  check_planes(x);
  LayerNormArguments p{};
  p.x = planes_of(x);
  p.mean = mean.as<float>(), p.rstd = rstd.as<float>();
  p.batch = int(x.size[0]), p.channels = int(x.size[1]), p.pixels = int(x.size[2] * x.size[3]);
  p.warps = is_held(p) ? (p.channels + kNormOwn - 1) / kNormOwn : kNormWarps;
  p.x_step = p.warps * p.x.s_channel;
  p.slices = is_held(p) ? 1 : (p.channels + kNormMostHeld - 1) / kNormMostHeld;
  return p;
}

// Lanes take pairs of pixels if these are aligned and still leave a tile for each SM.
bool in_pairs(const LayerNormArguments& p, const Tensor& x, const Tensor& y) {
  const auto aligned = [](const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
  return is_held(p) && x.dtype != DType::f32 && p.pixels % 2 == 0 && are_pairs(p.x, x.dtype) &&
         aligned(p.mean, 8) && aligned(p.rstd, 8) && aligned(p.y, 2 * bytes_of(y.dtype)) &&
         norm_tiles<2>(p) >= multiprocessors();
}

// Parts in backward: at most sixteen warps per SM.
int parts_of(const LayerNormArguments& p) {
  const int64_t wanted = int64_t(multiprocessors()) * std::max(1, kNormWarps / std::max(1, p.warps));
  return int(std::min(norm_tiles<1>(p), (wanted + p.slices - 1) / std::max(1, p.slices)));
}

int64_t partial_floats(const LayerNormArguments& p) { return int64_t(parts_of(p)) * 2 * p.channels; }

}  // namespace

MIRAGE_KERNELS(list) {
  for (const DType x : {DType::f32, DType::f16, DType::bf16}) {
    for (const DType y : {x, DType::f32}) {
      for (const bool pairs : {false, true}) with_kernels(x, y, pairs, [&](auto kernels) { kernels.list(list); });
    }
  }
  list.add<layer_norm_sum_kernel>(kNormWarps * kLanes, floats(kNormWarps * kLanes));
}

void channel_layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y,
                                const Tensor& mean, const Tensor& rstd, const Options& options) {
  layer_norm::check_forward(x, weight, bias, y, mean, rstd);
  LayerNormArguments p = arguments_of(x, mean, rstd);
  check_kernel_dtype("weight", weight);
  check_kernel_dtype("bias", bias);
  p.weight = vector_of(weight), p.bias = vector_of(bias);
  p.y = y.data, p.eps = float(eps);
  if (x.numel() == 0) return;
  with_kernels(x.dtype, y.dtype, in_pairs(p, x, y), [&](auto kernels) { kernels.forward(p, options.stream); });
}

int64_t channel_layer_norm_backward_workspace(const Tensor& x) {
  check_ndim("x", x, 4);
  const LayerNormArguments p = arguments_of(x, {}, {});
  return floats(partial_floats(p) + (is_held(p) ? 0 : 2 * int64_t(p.batch) * p.pixels));
}

void channel_layer_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                 const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight,
                                 const Tensor& grad_bias, const Options& options) {
  layer_norm::check_backward(grad_y, x, weight, mean, rstd, grad_x, grad_weight, grad_bias);
  LayerNormArguments p = arguments_of(x, mean, rstd);
  p.grad_y = planes_of(grad_y), p.grad_step = p.warps * p.grad_y.s_channel;
  check_kernel_dtype("weight", weight);
  check_kernel_dtype("grad_weight", grad_weight);
  check_kernel_dtype("grad_bias", grad_bias);
  p.weight = vector_of(weight);
  p.grad_weight = vector_of(grad_weight), p.grad_bias = vector_of(grad_bias);
  p.y = grad_x.data, p.parts = parts_of(p);
  check_workspace(options, channel_layer_norm_backward_workspace(x));
  p.partial = static_cast<float*>(options.workspace), p.along = p.partial + partial_floats(p);
  if (p.channels == 0) return;
  const bool pairs = in_pairs(p, x, grad_x) && are_pairs(p.grad_y, grad_y.dtype);
  with_kernels(x.dtype, grad_y.dtype, pairs, [&](auto kernels) {
    if (x.numel() == 0) kernels.sum(p, options.stream);
    else kernels.backward(p, options.stream);
  });
}

}  // namespace mirage::cuda
