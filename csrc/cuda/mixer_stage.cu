// mixer_stage on a GPU: argument checks, and the choice of kernels.
#include "mirage/cuda/mixer_stage.h"

#include "call_checks.h"
#include "mixer_stage_launch.h"
#include "stage_checks.h"

namespace mirage::cuda {

namespace {

MixerRunner runner_for(const Tensor& x, const Options& options) {
  const int branch = int(x.size[1] / 3);
  switch (x.dtype) {
    case DType::f16: return mixer_runner<TensorCores16<f16>>(branch);
    case DType::bf16: return mixer_runner<TensorCores16<bf16>>(branch);
    default: break;
  }
  return options.tf32 ? mixer_runner<TensorCoresTf32>(branch) : mixer_runner<ExactFloat>(branch);
}

MixerArguments sizes_of(const Tensor& x, int64_t heads, int64_t hidden) {
  MixerArguments p{};
  p.batch = int(x.size[0]), p.branch = int(x.size[1] / 3), p.height = int(x.size[2]), p.width = int(x.size[3]);
  p.heads = int(heads), p.hidden = int(hidden);
  return p;
}

// Packed weights, moments of each pixel, then what the parts leave.
int64_t packed_floats(const MixerPlan& plan) { return (plan.packed_bytes + 255) / 256 * 64; }
int64_t moments_of(const MixerArguments& p) { return 2 * int64_t(p.batch) * p.height * p.width; }

int64_t workspace_of(const MixerArguments& p, const MixerPlan& plan) {
  const int64_t parts = int64_t(p.batch) * plan.parts * p.partial_size();
  return (packed_floats(plan) + moments_of(p) + parts) * int64_t(sizeof(float));
}

}  // namespace

MIRAGE_KERNELS(list) {
  for (const int blocks : kMixerBlocks) {
    mixer_runner<TensorCores16<f16>>(16 * blocks).list(list);
    mixer_runner<TensorCores16<bf16>>(16 * blocks).list(list);
    mixer_runner<TensorCoresTf32>(16 * blocks).list(list);
    mixer_runner<ExactFloat>(16 * blocks).list(list);
  }
}

std::string mixer_stage_problem(const Tensor& x, const Options& options) {
  if (x.dtype == DType::f64) return "float64";
  for (int64_t size : {x.size[0], x.size[2], x.size[3]}) {
    if (size > INT32_MAX / 64) return "a size of " + std::to_string(size);
  }
  if ((x.size[2] + 3) / 4 * ((x.size[3] + 15) / 16) > INT32_MAX) return "so many pixels";
  if (x.size[1] > 3 * kMixerMostBranch) return std::to_string(x.size[1]) + " channels";
  return shared_memory_problem(runner_for(x, options).plan(sizes_of(x, 1, x.size[1] / 3)).shared_bytes);
}

int64_t mixer_stage_workspace(const Tensor& x, int64_t heads, int64_t hidden, const Options& options) {
  const MixerArguments p = sizes_of(x, heads, hidden);
  return workspace_of(p, runner_for(x, options).plan(p));
}

void mixer_stage(const Tensor& x, const MixerWeights& w, const Tensor& branch_scale, const MixerOptions& mixer,
                 const MixerStatistics& statistics, const Tensor& y, const Options& options) {
  check_mixer_stage(x, w, branch_scale, statistics);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  const std::string problem = mixer_stage_problem(x, options);
  if (!problem.empty()) fail("x", "what the CUDA kernels of mixer_stage take", problem);
  if (w.norm_weight.dtype != x.dtype) check_dtype("norm_weight", w.norm_weight, DType::f32);
  MixerArguments p = sizes_of(x, w.temperature.size[0], w.gic2.size[1]);
  const struct {
    const char* argument;
    const Tensor& weight;
    const void*& data;
  } all[] = {{"norm_weight", w.norm_weight, p.norm_weight},
             {"norm_bias", w.norm_bias, p.norm_bias},
             {"qkv", w.qkv, p.qkv},
             {"qkv_dwconv", w.qkv_dwconv, p.qkv_dwconv},
             {"temperature", w.temperature, p.temperature},
             {"bn_weight", w.bn_weight, p.bn_weight},
             {"bn_bias", w.bn_bias, p.bn_bias},
             {"bn_mean", w.bn_mean, p.bn_mean},
             {"bn_var", w.bn_var, p.bn_var},
             {"gic1", w.gic1, p.gic1},
             {"generator_in", w.generator_in, p.generator_in},
             {"generator_out", w.generator_out, p.generator_out},
             {"gate_temperature", w.gate_temperature, p.gate_temperature},
             {"gic2", w.gic2, p.gic2},
             {"proj_out", w.proj_out, p.proj_out},
             {"mlp_in", w.mlp_in, p.mlp_in},
             {"mlp_out", w.mlp_out, p.mlp_out},
             {"alpha_att", w.alpha_att, p.alpha_att},
             {"alpha_conv", w.alpha_conv, p.alpha_conv},
             {"alpha_mlp", w.alpha_mlp, p.alpha_mlp},
             {"project_out", w.project_out, p.project_out}};
  for (const auto& [argument, weight, data] : all) {
    check_dtype(argument, weight, w.norm_weight.dtype);
    data = weight.data;
  }
  if (x.numel() == 0) return;
  p.wide = w.norm_weight.dtype == DType::f32;
  p.x = x.data, p.y = y.data;
  p.s_batch = x.stride[0], p.s_channel = x.stride[1], p.s_row = x.stride[2], p.s_column = x.stride[3];
  p.branch_scale = branch_scale.as<const float>();
  p.eps = float(mixer.norm_eps), p.bn_eps = float(mixer.bn_eps), p.training = mixer.training;
  p.attention = statistics.attention.as<float>(), p.kernels = statistics.kernels.as<float>();
  p.branch_mean = statistics.branch_mean.as<float>();
  p.batch_mean = statistics.batch_mean.as<float>(), p.batch_var = statistics.batch_var.as<float>();
  const MixerRunner runner = runner_for(x, options);
  const MixerPlan plan = runner.plan(p);
  check_workspace(options, workspace_of(p, plan));
  p.parts = plan.parts;
  p.packed = static_cast<float*>(options.workspace);
  p.moments = p.packed + packed_floats(plan), p.partial = p.moments + moments_of(p);
  runner.run(p, plan, options.stream);
}

}  // namespace mirage::cuda
