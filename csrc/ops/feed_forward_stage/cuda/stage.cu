// feed_forward_stage on a GPU: checks the arguments and selects the kernel.
#include "mirage/cuda/feed_forward_stage.h"

#include <vector>

#include "common/cuda/call_checks.h"
#include "forward_launch.h"
#include "ops/feed_forward_stage/checks.h"

namespace mirage::cuda {

namespace {

FeedForwardRunner runner_for(const Tensor& x, const Options& options) {
  const int channels = int(x.size[1]);
  switch (x.dtype) {
    case DType::f16: return feed_forward_runner<TensorCores16<f16>>(channels);
    case DType::bf16: return feed_forward_runner<TensorCores16<bf16>>(channels);
    default: break;
  }
  return options.tf32 ? feed_forward_runner<TensorCoresTf32>(channels) : feed_forward_runner<ExactFloat>(channels);
}

int64_t workspace_of(const Tensor& x, const FeedForwardPlan& plan) {
  return plan.splits == 1 ? 0 : plan.splits * x.numel() * int64_t(sizeof(float));
}

MIRAGE_KERNELS(list) {
  for (const int tiles : kFeedForwardChannelTiles) {
    feed_forward_runner<TensorCores16<f16>>(16 * tiles).list(list);
    feed_forward_runner<TensorCores16<bf16>>(16 * tiles).list(list);
    feed_forward_runner<TensorCoresTf32>(16 * tiles).list(list);
    feed_forward_runner<ExactFloat>(16 * tiles).list(list);
  }
}

}  // namespace

std::string feed_forward_stage_problem(const Tensor& x, const Tensor& project_out, const Options& options) {
  if (x.dtype == DType::f64) return "float64";
  for (int64_t size : {x.size[0], x.size[2], x.size[3], project_out.size[1]}) {
    if (size > INT32_MAX / 64) return "a size of " + std::to_string(size);
  }
  if (!is_near(x)) return kFar;
  if (x.size[1] > kFeedForwardMostChannels) return std::to_string(x.size[1]) + " channels";
  return shared_memory_problem(runner_for(x, options).plan(feed_forward_sizes(x, project_out.size[1])).shared_bytes);
}

int64_t feed_forward_packed_bytes(const Tensor& x, int64_t pairs, const Options& options) {
  return (runner_for(x, options).packed_bytes(pairs) + 255) / 256 * 256;
}

int64_t feed_forward_packed_workspace(const Tensor& x, int64_t pairs, const Options& options) {
  return workspace_of(x, runner_for(x, options).plan(feed_forward_sizes(x, pairs)));
}

int64_t feed_forward_stage_workspace(const Tensor& x, const Tensor& project_out, const Options& options) {
  const int64_t pairs = project_out.size[1];
  return feed_forward_packed_bytes(x, pairs, options) + feed_forward_packed_workspace(x, pairs, options);
}

void pack_feed_forward(const Tensor& x, const FeedForwardToPack* stages, int64_t count, const Options& options) {
  std::vector<FeedForwardArguments> all;
  for (int64_t i = 0; i < count; ++i) {
    FeedForwardArguments p = feed_forward_weights(x, stages[i].weights);
    p.packed = stages[i].packed;
    all.push_back(p);
  }
  if (x.numel() != 0) runner_for(x, options).pack(all.data(), count, options.stream);
}

void feed_forward_stage_packed(const Tensor& x, double eps, int64_t pairs, const void* packed, const Tensor& y,
                               const Options& options) {
  if (x.numel() == 0) return;
  FeedForwardArguments p = feed_forward_sizes(x, pairs);
  p.packed = packed;
  p.x = x.data, p.y = y.data, p.partial = static_cast<float*>(options.workspace), p.eps = float(eps);
  p.s_batch = x.stride[0], p.s_channel = x.stride[1], p.s_row = x.stride[2], p.s_column = x.stride[3];
  const FeedForwardRunner runner = runner_for(x, options);
  const FeedForwardPlan plan = runner.plan(p);
  p.splits = plan.splits;
  runner.run(p, plan, options.stream);
}

void feed_forward_stage(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out, const Tensor& y,
                        const Options& options) {
  check_feed_forward_stage(x, norm_weight, norm_bias, project_in, dwconv, project_out);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  const std::string problem = feed_forward_stage_problem(x, project_out, options);
  if (!problem.empty()) fail("x", "what the CUDA kernel of feed_forward_stage takes", problem);
  const int64_t pairs = project_out.size[1];
  if (x.numel() != 0) check_workspace(options, feed_forward_stage_workspace(x, project_out, options));
  const FeedForwardToPack stage{{norm_weight, norm_bias, project_in, dwconv, project_out, {}, {}, {}}, options.workspace};
  pack_feed_forward(x, &stage, 1, options);
  Options rest = options;
  if (x.numel() != 0)
    rest.workspace = static_cast<char*>(rest.workspace) + feed_forward_packed_bytes(x, pairs, options);
  feed_forward_stage_packed(x, eps, pairs, stage.packed, y, rest);
}

}  // namespace mirage::cuda
