// gated_depthwise_ffn on the CPU: argument checks and the choice of instruction set.
#include "mirage/gated_depthwise_ffn.h"

#include "gated_depthwise_ffn_kernels.h"

namespace mirage {
namespace {

void check_inputs(const Tensor& h, const Tensor& weight) {
  check_ndim("h", h, 4);
  if (h.size[1] % 2) fail("h", "an even number of channels", shape_of(h));
  check_shape("weight", weight, {h.size[1], 9});
  check_dtype("weight", weight, h.dtype);
  check_contiguous("weight", weight);
}

}  // namespace

void gated_depthwise_ffn_forward(const Tensor& h, const Tensor& weight, const Tensor& y) {
  check_inputs(h, weight);
  check_shape("y", y, {h.size[0], h.size[1] / 2, h.size[2], h.size[3]});
  check_dtype("y", y, h.dtype);
  check_contiguous("y", y);
  if (y.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(gated_depthwise_ffn_forward(h, weight, y));
}

void gated_depthwise_ffn_backward(const Tensor& grad_y, const Tensor& h, const Tensor& weight, const Tensor& grad_h,
                                  const Tensor& grad_weight) {
  check_inputs(h, weight);
  check_shape("grad_y", grad_y, {h.size[0], h.size[1] / 2, h.size[2], h.size[3]});
  check_dtype("grad_y", grad_y, h.dtype);
  check_shape("grad_h", grad_h, {h.size[0], h.size[1], h.size[2], h.size[3]});
  check_dtype("grad_h", grad_h, h.dtype);
  check_contiguous("grad_h", grad_h);
  check_shape("grad_weight", grad_weight, {h.size[1], 9});
  check_dtype("grad_weight", grad_weight, h.dtype);
  check_contiguous("grad_weight", grad_weight);
  if (grad_weight.numel() == 0) return;
  using namespace cpu;
  MIRAGE_DISPATCH_ISA(gated_depthwise_ffn_backward(grad_y, h, weight, grad_h, grad_weight));
}

}  // namespace mirage
