// feed_forward_stage_backward on a GPU: checks the arguments and selects the kernels.
#include "backward_launch.h"
#include "common/cuda/call_checks.h"
#include "mirage/cuda/feed_forward_stage.h"
#include "ops/feed_forward_stage/checks.h"
#include "weight_gradient.h"

namespace mirage::cuda {

namespace {

FeedForwardBackwardRunner runner_for(const Tensor& x, const Options& options) {
  const int channels = int(x.size[1]);
  const int64_t limit = shared_memory_limit();
  switch (x.dtype) {
    case DType::f16: return feed_forward_backward_runner<TensorCores16<f16>>(channels, limit);
    case DType::bf16: return feed_forward_backward_runner<TensorCores16<bf16>>(channels, limit);
    default: break;
  }
  return options.tf32 ? feed_forward_backward_runner<TensorCoresTf32>(channels, limit)
                      : feed_forward_backward_runner<ExactFloat>(channels, limit);
}

MIRAGE_KERNELS(list) {
  list.add<feed_forward_weights_kernel>(256, 1024);
  for (const int channels : {32, 48, 64, 96, 128, 192, 240}) {
    for (const int64_t limit : {int64_t(163) << 10, int64_t(227) << 10}) {
      feed_forward_backward_runner<TensorCores16<f16>>(channels, limit).list(list);
      feed_forward_backward_runner<TensorCores16<bf16>>(channels, limit).list(list);
      if (channels > feed_forward_backward_most_channels(false)) continue;
      feed_forward_backward_runner<TensorCoresTf32>(channels, limit).list(list);
      feed_forward_backward_runner<ExactFloat>(channels, limit).list(list);
    }
  }
}

}  // namespace

std::string feed_forward_stage_backward_problem(const Tensor& x, const Tensor& project_out, const Options& options) {
  if (x.dtype == DType::f64) return "float64";
  for (int64_t size : {x.size[0], x.size[2], x.size[3], project_out.size[1]}) {
    if (size > INT32_MAX / 64) return "a size of " + std::to_string(size);
  }
  if (!is_near(x)) return kFar;
  const int most = feed_forward_backward_most_channels(x.dtype != DType::f32);
  if (x.size[1] > most) return std::to_string(x.size[1]) + " channels";
  const FeedForwardBackwardPlan plan = runner_for(x, options).plan(feed_forward_sizes(x, project_out.size[1]));
  if (plan.tiles > INT32_MAX) return std::to_string(plan.tiles) + " tiles";
  return shared_memory_problem(plan.shared_bytes);
}

int64_t feed_forward_stage_backward_workspace(const Tensor& x, const Tensor& project_out, const Options& options) {
  return runner_for(x, options).plan(feed_forward_sizes(x, project_out.size[1])).bytes();
}

void feed_forward_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& norm_weight,
                                 const Tensor& norm_bias, double eps, const Tensor& project_in, const Tensor& dwconv,
                                 const Tensor& project_out, const Tensor& grad_x,
                                 const FeedForwardGradients& gradients, const Options& options) {
  const FeedForwardWeights weights{norm_weight, norm_bias, project_in, dwconv, project_out, {}, {}, {}};
  check_feed_forward_stage(x, weights);
  check_feed_forward_stage_backward(grad_y, x, weights, grad_x, gradients);
  const std::string problem = feed_forward_stage_backward_problem(x, project_out, options);
  if (!problem.empty()) fail("x", "what the CUDA kernel of feed_forward_stage_backward takes", problem);
  if (!is_near(grad_y)) fail("grad_y", "rows and columns less than 2^25 elements apart", kFar);
  FeedForwardBackwardArguments p{};
  static_cast<FeedForwardArguments&>(p) =
      feed_forward_weights(x, weights);
  p.x = x.data, p.grad_y = grad_y.data, p.grad_x = grad_x.data, p.eps = float(eps);
  p.s_batch = x.stride[0], p.s_channel = x.stride[1], p.s_row = x.stride[2], p.s_column = x.stride[3];
  p.g_batch = grad_y.stride[0], p.g_channel = grad_y.stride[1], p.g_row = grad_y.stride[2];
  p.g_column = grad_y.stride[3];
  p.grad_norm_weight = gradients.norm_weight.as<float>(), p.grad_norm_bias = gradients.norm_bias.as<float>();
  p.grad_project_in = gradients.project_in.as<float>(), p.grad_dwconv = gradients.dwconv.as<float>();
  p.grad_project_out = gradients.project_out.as<float>();
  const FeedForwardBackwardRunner runner = runner_for(x, options);
  const FeedForwardBackwardPlan plan = runner.plan(p);
  check_workspace(options, plan.bytes());
  p.tiles = int(plan.tiles), p.ranges = plan.ranges, p.splits = plan.splits, p.channel_tiles = plan.channel_tiles;
  p.groups = plan.groups;
  p.packed = options.workspace;
  p.sums = static_cast<float*>(options.workspace) + plan.packed;  // first, as it has to be aligned
  p.partial = p.sums + plan.ranges * plan.chunks * plan.sums;
  p.norm_sums = p.partial + plan.partial;
  if (plan.tiles > 0) runner.run(p, plan, options.stream);
  const int64_t blocks = (plan.chunks * plan.sums + kLanes - 1) / kLanes + (2 * p.channels + kLanes - 1) / kLanes;
  if (blocks == 0) return;
  launch("feed_forward_weights_kernel", feed_forward_weights_kernel, {blocks, 256, 1024}, options.stream, p,
         plan.chunks, int(plan.sums));
}

}  // namespace mirage::cuda
