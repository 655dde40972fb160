// gated_depthwise_ffn on a GPU: checks the arguments and selects the kernels.
#include "mirage/cuda/gated_depthwise_ffn.h"

#include <algorithm>

#include "checks.h"
#include "common/cuda/registry.h"
#include "common/cuda/tensor_views.h"
#include "cuda_kernels.h"

namespace mirage::cuda {

namespace {

template <class T>
struct Gate {
  static void forward(const GateArguments& p, void* stream) {
    launch("gate_kernel", gate_kernel<T>, {p.pairs * gate_tiles(p), kGateThreads, sizeof(GateTile<1>)}, stream, p);
  }

  static void backward(const GateArguments& p, void* grad_weight, void* stream) {
    if (p.parts > 0) {
      launch("gate_backward_kernel", gate_backward_kernel<T>,
             {int64_t(p.pairs) * p.parts, kGateThreads, sizeof(GateBackwardTile)}, stream, p);
    }
    launch("gate_sum_kernel", gate_sum_kernel<T>, {(int64_t(p.pairs) * 18 + 7) / 8, 256, 0}, stream, p, grad_weight);
  }

  static void list(KernelList& list) {
    list.add<gate_kernel<T>>(kGateThreads, sizeof(GateTile<1>));
    list.add<gate_backward_kernel<T>>(kGateThreads, sizeof(GateBackwardTile));
    list.add<gate_sum_kernel<T>>(256, 0);
  }
};

template <class Function>
void with_kernel(DType dtype, Function function) {
  with_type(dtype, [&](auto type) { function(Gate<decltype(type)>()); });
}

// Whether runs of kGateRun columns are aligned in a tensor of that width.
bool is_packed(const void* data, int64_t width, int64_t bytes) {
  return width % kGateRun == 0 && reinterpret_cast<uintptr_t>(data) % uintptr_t(kGateRun * bytes) == 0;
}

// Parts per pair: eight blocks per SM, but no more parts than tiles; none if there are no pixels.
int parts_of(const GateArguments& p) {
  if (p.pairs == 0) return 0;
  return int(std::min<int64_t>(gate_tiles(p), (8 * int64_t(multiprocessors()) + p.pairs - 1) / p.pairs));
}

GateArguments arguments_of(const Tensor& h, const Tensor& weight) {
  check_kernel_dtype("h", h);
  for (int64_t size : {h.size[1], h.size[2], h.size[3]}) {
    if (size > INT32_MAX / 64) fail("h", "sizes up to " + std::to_string(INT32_MAX / 64), shape_of(h));
  }
  GateArguments p{};
  p.h = h.data, p.weight = weight.data;
  std::copy(h.stride, h.stride + 4, p.h_stride);
  p.packed_in = is_packed(h.data, h.size[3], bytes_of(h.dtype)) && h.stride[3] == 1 &&
                std::all_of(h.stride, h.stride + 3, [](int64_t stride) { return stride % kGateRun == 0; });
  p.batch = h.size[0], p.pairs = int(h.size[1] / 2), p.height = int(h.size[2]), p.width = int(h.size[3]);
  p.parts = parts_of(p);
  return p;
}

int64_t workspace_of(const GateArguments& p) { return int64_t(p.pairs) * 18 * p.parts * int64_t(sizeof(float)); }

}  // namespace

MIRAGE_KERNELS(list) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_kernel(dtype, [&](auto kernels) { kernels.list(list); });
  }
}

void gated_depthwise_ffn_forward(const Tensor& h, const Tensor& weight, const Tensor& y, const Options& options) {
  gated::check_forward(h, weight, y);
  GateArguments p = arguments_of(h, weight);
  if (y.numel() == 0) return;
  p.out = y.data, p.packed_out = is_packed(y.data, h.size[3], bytes_of(h.dtype));
  with_kernel(h.dtype, [&](auto kernels) { kernels.forward(p, options.stream); });
}

int64_t gated_depthwise_ffn_backward_workspace(const Tensor& h, const Tensor& weight) {
  gated::check_inputs(h, weight);
  return workspace_of(arguments_of(h, weight));
}

void gated_depthwise_ffn_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
                                  const Tensor& grad_weight, const Options& options) {
  gated::check_backward(grad_y, h, weight, grad_h, grad_weight);
  GateArguments p = arguments_of(h, weight);
  if (grad_weight.numel() == 0) return;
  check_workspace(options, workspace_of(p));
  p.grad_y = grad_y.data, p.out = grad_h.data, p.partial = static_cast<float*>(options.workspace);
  p.packed_out = is_packed(grad_h.data, h.size[3], bytes_of(h.dtype));
  std::copy(grad_y.stride, grad_y.stride + 4, p.grad_stride);
  with_kernel(h.dtype, [&](auto kernels) { kernels.backward(p, grad_weight.data, options.stream); });
}

}  // namespace mirage::cuda
