// dynamic_depthwise_conv2d on a GPU: checks the arguments and selects the kernels.
#include "mirage/cuda/dynamic_depthwise_conv2d.h"

#include <algorithm>

#include "checks.h"
#include "common/cuda/call_checks.h"
#include "common/cuda/registry.h"
#include "cuda_kernels.h"

namespace mirage::cuda {

namespace {

template <class T, int K>
struct Depthwise {
  using Tile = DepthwiseTile<K>;

  static int64_t tiles(const DepthwiseArguments& p) {
    return int64_t((p.width + Tile::kSide - 1) / Tile::kSide) * ((p.height + Tile::kSide - 1) / Tile::kSide);
  }

  static void convolve(const DepthwiseArguments& p, void* stream) {
    launch("depthwise_kernel", depthwise_kernel<T, K>, {p.planes * tiles(p), kDepthwiseThreads, sizeof(Tile)}, stream,
           p);
  }

  static void weight(const DepthwiseArguments& p, void* stream) {
    launch("depthwise_weight_kernel", depthwise_weight_kernel<T, K>,
           {p.planes * p.parts, kDepthwiseThreads, sizeof(Tile)}, stream, p);
    const int64_t size = p.planes * K * K;
    launch("depthwise_sum_kernel", depthwise_sum_kernel<T>, {(size + 255) / 256, 256, 0}, stream, p, size);
  }

  static void list(KernelList& list) {
    list.add<depthwise_kernel<T, K>>(kDepthwiseThreads, sizeof(Tile));
    list.add<depthwise_weight_kernel<T, K>>(kDepthwiseThreads, sizeof(Tile));
    list.add<depthwise_sum_kernel<T>>(256, 0);
  }
};

template <class T, class Function>
void with_size(int64_t size, Function function) {
  switch (size) {
    case 3: return function(Depthwise<T, 3>());
    case 5: return function(Depthwise<T, 5>());
    case 7: return function(Depthwise<T, 7>());
    case 9: return function(Depthwise<T, 9>());
    default: return function(Depthwise<T, 11>());
  }
}

template <class Function>
void with_kernel(DType dtype, int64_t size, Function function) {
  switch (dtype) {
    case DType::f16: return with_size<f16>(size, function);
    case DType::bf16: return with_size<bf16>(size, function);
    default: return with_size<float>(size, function);
  }
}

DepthwiseArguments arguments_of(const Tensor& x, const Tensor& weight) {
  check_kernel_dtype("x", x);
  for (int64_t size : {x.size[1], x.size[2], x.size[3]}) {
    if (size > INT32_MAX / 64) fail("x", "sizes up to " + std::to_string(INT32_MAX / 64), shape_of(x));
  }
  DepthwiseArguments p{};
  p.x = x.data, p.weight = weight.data;
  std::copy(x.stride, x.stride + 4, p.x_stride);
  std::copy(weight.stride, weight.stride + 4, p.weight_stride);
  p.channels = int(x.size[1]), p.height = int(x.size[2]), p.width = int(x.size[3]);
  p.planes = x.size[0] * x.size[1];
  return p;
}

// Parts per plane: two blocks per SM, but no more parts than tiles.
int parts_of(const DepthwiseArguments& p) {
  if (p.planes == 0) return 1;
  const int64_t tiles = int64_t((p.width + 31) / 32) * ((p.height + 31) / 32);
  return int(std::max<int64_t>(1, std::min(tiles, (2 * multiprocessors() + p.planes - 1) / p.planes)));
}

}  // namespace

MIRAGE_KERNELS(list) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const int64_t size : {3, 5, 7, 9, 11}) with_kernel(dtype, size, [&](auto kernels) { kernels.list(list); });
  }
}

void dynamic_depthwise_conv2d_forward(const Tensor& x, const Tensor& weight, const Tensor& y, const Options& options) {
  depthwise::check_inputs(x, weight);
  depthwise::check_output("y", y, x);
  DepthwiseArguments p = arguments_of(x, weight);
  if (x.numel() == 0) return;
  p.y = y.data;
  with_kernel(x.dtype, weight.size[2], [&](auto kernels) { kernels.convolve(p, options.stream); });
}

int64_t dynamic_depthwise_conv2d_backward_workspace(const Tensor& x, const Tensor& weight) {
  depthwise::check_inputs(x, weight);
  const DepthwiseArguments p = arguments_of(x, weight);
  return parts_of(p) * weight.numel() * int64_t(sizeof(float));
}

void dynamic_depthwise_conv2d_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& grad_x, const Tensor& grad_weight, const Options& options) {
  depthwise::check_inputs(x, weight);
  depthwise::check_like("grad_y", grad_y, x);
  depthwise::check_optional_output("grad_x", grad_x, x);
  depthwise::check_optional_output("grad_weight", grad_weight, weight);
  const DepthwiseArguments of_x = arguments_of(x, weight);
  if (depthwise::is_wanted(grad_x) && x.numel() > 0) {
    DepthwiseArguments p = arguments_of(grad_y, weight);
    p.y = grad_x.data, p.flip = true;
    with_kernel(x.dtype, weight.size[2], [&](auto kernels) { kernels.convolve(p, options.stream); });
  }
  if (depthwise::is_wanted(grad_weight) && weight.numel() > 0) {
    DepthwiseArguments p = of_x;
    p.grad_y = grad_y.data, p.y = grad_weight.data, p.parts = parts_of(p);
    std::copy(grad_y.stride, grad_y.stride + 4, p.grad_stride);
    check_workspace(options, dynamic_depthwise_conv2d_backward_workspace(x, weight));
    p.partial = static_cast<float*>(options.workspace);
    with_kernel(x.dtype, weight.size[2], [&](auto kernels) { kernels.weight(p, options.stream); });
  }
}

}  // namespace mirage::cuda
