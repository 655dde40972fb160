// feed_forward_stage on the CPU: argument checks and the choice of instruction set.
#include "mirage/feed_forward_stage.h"

#include "kernels.h"
#include "ops/feed_forward_stage/checks.h"

namespace mirage {

namespace {

void check_hidden(const Tensor& x, const Tensor& project_out, const Tensor* hidden) {
  if (hidden) check_dense("hidden", *hidden, x.dtype, {x.size[0], 2 * project_out.size[1], x.size[2], x.size[3]});
}

}  // namespace

void feed_forward_stage(const Tensor& x, const FeedForwardWeights& weights, const FeedForwardOptions& options,
                        const Tensor& y, const Tensor* hidden, const Tensor& scale) {
  check_feed_forward_stage(x, weights);
  if (exists(scale)) check_dense("scale", scale, {x.size[1]});
  check_hidden(x, weights.project_out, hidden);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (x.numel() == 0) return;
  if (x.data == y.data) {
    check_dense("x, which is written over,", x, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
    if (exists(weights.excite)) fail("y", "memory other than that of x, where there is excite", "the same");
  }
  using namespace cpu;
  MIRAGE_DISPATCH_PRODUCTS_OF(x.dtype, feed_forward_stage(x, weights, options, {0, 0, x.size[2], x.size[3]}, y, hidden, scale));
}

void feed_forward_stage_region(const Tensor& x, const Window& window, const Cuts& rows, const Cuts& columns,
                               const FeedForwardWeights& weights, const FeedForwardOptions& options, const Tensor& y) {
  check_feed_forward_stage(x, weights);
  if (exists(weights.excite)) fail("excite", "none: a part of a map has no means of all of it", "a tensor");
  check_window(x, window);
  check_cuts("rows", rows, window.height, window.row, x.size[2], 1);
  check_cuts("columns", columns, window.width, window.column, x.size[3], 1);
  check_lines("y", y, x.dtype, {x.size[0], x.size[1], rows.length(), columns.length()});
  if (x.size[0] * x.size[1] == 0) return;
  using namespace cpu;
  const Tensor from = whole_map(x, window), to = whole_map(y, {window.height, window.width, rows.first(), columns.first()});
  const Region region{rows.first(), columns.first(), rows.length(), columns.length()};
  MIRAGE_DISPATCH_PRODUCTS_OF(x.dtype, feed_forward_stage(from, weights, options, region, to, nullptr, {}));
}

void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const FeedForwardWeights& weights,
                                 const FeedForwardOptions& options, const Tensor* hidden, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients) {
  check_feed_forward_stage(x, weights);
  check_hidden(x, weights.project_out, hidden);
  check_feed_forward_stage_backward(grad_y, x, weights, grad_x, gradients);
  if (x.numel() == 0) return clear_gradients(feed_forward_gradients(weights, gradients));
  using namespace cpu;
  MIRAGE_DISPATCH_ISA_OF(x.dtype,
                         feed_forward_stage_backward(grad_y, x, weights, options, hidden, grad_x, gradients));
}

}  // namespace mirage
