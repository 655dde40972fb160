// mixer_stage_backward on a GPU: checks the arguments, selects the kernels, and divides the workspace.
#include "arguments.h"
#include "backward_launch.h"
#include "backward_pack.h"
#include "backward_weight_gradient.h"
#include "common/cuda/call_checks.h"
#include "common/cuda/scratch.h"
#include "mirage/cuda/mixer_stage.h"
#include "ops/mixer_stage/checks.h"

namespace mirage::cuda {

namespace {

MixerBackwardRunner runner_for(const Tensor& x, const Options& options) {
  const int branch = int(x.size[1] / 3);
  const int64_t limit = shared_memory_limit();
  switch (x.dtype) {
    case DType::f16: return mixer_backward_runner<TensorCores16<f16>>(branch, limit);
    case DType::bf16: return mixer_backward_runner<TensorCores16<bf16>>(branch, limit);
    default: break;
  }
  return options.tf32 ? mixer_backward_runner<TensorCoresTf32>(branch, limit)
                      : mixer_backward_runner<ExactFloat>(branch, limit);
}

MIRAGE_KERNELS(list) {
  list.add<mixer_weights_kernel>(kTileThreads, 1024);
  for (int branch = 16; branch <= mixer_backward_most_branch(true); branch += 16) {
    for (const int64_t limit : {int64_t(163) << 10, int64_t(227) << 10}) {
      mixer_backward_runner<TensorCores16<f16>>(branch, limit).list(list);
      mixer_backward_runner<TensorCores16<bf16>>(branch, limit).list(list);
      if (branch > mixer_backward_most_branch(false)) continue;
      mixer_backward_runner<TensorCoresTf32>(branch, limit).list(list);
      mixer_backward_runner<ExactFloat>(branch, limit).list(list);
    }
  }
}

// Carves the workspace into the argument pointers and returns its size in bytes (null memory: size only).
int64_t carve_workspace(MixerBackwardArguments& p, const MixerBackwardPlan& plan, int64_t element, void* memory) {
  const MixerSumsAt sums(p);
  const int64_t batch = p.batch, branch = p.branch, plane = p.plane();
  Scratch scratch(memory);
  p.packed = static_cast<float*>(scratch.next(mixer_packed_bytes(p, element)));
  p.backward = static_cast<float*>(scratch.next(mixer_backward_packed_bytes(p, element)));
  p.moments = static_cast<NormMoments*>(scratch.next(batch * plane * sizeof(NormMoments)));
  for (void** map : {&p.content, &p.grad_content, &p.grad_v, &p.grad_total, &p.grad_bn, &p.grad_n1, &p.grad_n3}) {
    *map = scratch.next(batch * branch * plane * element);
  }
  const auto parts = [&](MixerParts& of, int blocks, int64_t size, int64_t of_sample) {
    of.blocks = blocks, of.size = int(size), of.of_sample = int(of_sample);
    of.sums = scratch.floats(blocks * size);
    of.samples = scratch.floats((blocks + batch - 1) * of_sample);
  };
  parts(p.fusion, plan.fusion, sums.of_fusion, branch * p.depth());
  parts(p.gate, plan.gate, sums.of_gate, 0);
  parts(p.detail, plan.detail, sums.of_detail, branch * kMixerTaps);
  parts(p.query, plan.query, sums.of_query, 0);
  parts(p.input, plan.input, 6 * branch, 0);
  p.scales = scratch.floats(batch * 4 * branch);
  p.grad_temperatures = scratch.floats(batch * p.heads);
  p.grad_kernels = scratch.floats(batch * branch * kMixerTaps);
  p.vectors = scratch.floats(batch * 6 * branch);
  p.batch_norm = scratch.floats(batch * 3 * branch);
  return scratch.used();
}

void set_gradients(MixerBackwardArguments& p, const MixerGradients& g) {
#define MIRAGE_SET_GRADIENT(name, ...) p.grad.name = g.name.as<float>();
  MIRAGE_MIXER_WEIGHTS(MIRAGE_SET_GRADIENT, MIRAGE_SET_GRADIENT, MIRAGE_NO_WEIGHT)
#undef MIRAGE_SET_GRADIENT
}

// The sums over blocks that make up the weight gradients; those of BatchNorm are complete already.
MixerSumList sums_of(const MixerBackwardArguments& p) {
  const MixerSumsAt at(p);
  const MixerSteps steps(p);
  const int c = p.branch, h = p.hidden, line = round_up_to_8(c), identities = h - c, taps = c * kMixerTaps;
  const auto from = [](const MixerParts& parts, int place, float* to, int rows, int columns, int line_from,
                       int line_to) {
    return MixerSum{to, rows, columns, line_to, parts.sums + place, line_from, parts.blocks, parts.size};
  };
  const auto products = [&](MixerSum sum, const float* left, int left_stride, int vector) {
    sum.left = left, sum.left_stride = left_stride, sum.samples = p.batch;
    sum.right = p.vectors + vector * c, sum.right_stride = 6 * c;
    return sum;
  };
  MixerSum gate_temperature = from(p.gate, at.gate_temperature, p.grad.gate_temperature, 1, 1, 1, 1);
  gate_temperature.is_temperature = true;
  const MixerSum detail = from(p.detail, at.detail, p.grad.gic1 + (2 * h - c) * c, c, c, line, c);
  return {{from(p.fusion, at.project_out, p.grad.project_out, 3 * c, 3 * c, round_up_to_8(3 * c), 3 * c),
           from(p.fusion, at.proj_out, p.grad.proj_out, c, c, line, c),
           from(p.fusion, at.mlp_in, p.grad.mlp_in, 2 * c, c, line, c),
           from(p.fusion, at.mlp_out, p.grad.mlp_out, c, 2 * c, round_up_to_8(2 * c), 2 * c),
           from(p.fusion, at.alphas, p.grad.alpha_att, 1, 1, 1, 1),
           from(p.fusion, at.alphas + 1, p.grad.alpha_conv, 1, 1, 1, 1),
           from(p.fusion, at.alphas + 2, p.grad.alpha_mlp, 1, 1, 1, 1),
           from(p.gate, at.gic2, p.grad.gic2, c, identities, 16 * steps.gate, h),
           from(p.gate, at.gic2 + 16 * steps.identities, p.grad.gic2 + identities, c, c, 16 * steps.gate, h),
           from(p.gate, at.gic1, p.grad.gic1, h + identities, c, line, c),
           gate_temperature,
           products(detail, p.vectors + 4 * c, 6 * c, 0),
           from(p.query, at.qkv, p.grad.qkv, 3 * c, c, line, c),
           from(p.query, at.taps, p.grad.qkv_dwconv, 3 * c, 9, 9, 9),
           from(p.input, 0, p.grad.norm_weight, 1, 3 * c, 3 * c, 3 * c),
           from(p.input, 3 * c, p.grad.norm_bias, 1, 3 * c, 3 * c, 3 * c),
           MixerSum{p.grad.temperature, 1, p.heads, p.heads, p.grad_temperatures, p.heads, p.batch, p.heads},
           products(MixerSum{p.grad.generator_in, c, c, c}, p.vectors + 3 * c, 6 * c, 1),
           products(MixerSum{p.grad.generator_out, taps, c, c}, p.grad_kernels, taps, 2)},
          p.packed + mixer_scalars(steps.channel_tiles)};
}

}  // namespace

std::string mixer_stage_backward_problem(const Tensor& x, const Options& options) {
  if (const std::string problem = mixer_problem(x); !problem.empty()) return problem;
  if (x.numel() == 0) return "no pixels";
  if (x.size[1] > 3 * mixer_backward_most_branch(x.dtype != DType::f32)) return std::to_string(x.size[1]) + " channels";
  return shared_memory_problem(runner_for(x, options).plan(mixer_sizes(x, 1, x.size[1] / 3)).shared_bytes);
}

int64_t mixer_stage_backward_workspace(const Tensor& x, int64_t heads, int64_t hidden, const Options& options) {
  MixerBackwardArguments p{};
  static_cast<MixerArguments&>(p) = mixer_sizes(x, heads, hidden);
  return carve_workspace(p, runner_for(x, options).plan(p), bytes_of(x.dtype), nullptr);
}

void mixer_stage_backward(const Tensor& grad_y, const Tensor& x, const MixerWeights& weights,
                          const Tensor& branch_scale, const MixerOptions& mixer, const MixerStatistics& statistics,
                          const Tensor& grad_x, const MixerGradients& gradients, const Options& options) {
  check_mixer_stage(x, weights, branch_scale, statistics);
  check_mixer_stage_backward(grad_y, x, weights, grad_x, gradients);
  const std::string problem = mixer_stage_backward_problem(x, options);
  if (!problem.empty()) fail("x", "what the CUDA kernels of mixer_stage_backward take", problem);
  if (!is_near(grad_y)) fail("grad_y", "rows and columns less than 2^25 elements apart", kFar);
  MixerBackwardArguments p{};
  static_cast<MixerArguments&>(p) = mixer_arguments(x, weights, branch_scale, mixer, statistics);
  p.grad_y = grad_y.data, p.grad_x = grad_x.data;
  p.g_batch = grad_y.stride[0], p.g_channel = grad_y.stride[1], p.g_row = grad_y.stride[2],
  p.g_column = grad_y.stride[3];
  set_gradients(p, gradients);
  const MixerBackwardRunner runner = runner_for(x, options);
  const MixerBackwardPlan plan = runner.plan(p);
  check_workspace(options, carve_workspace(p, plan, bytes_of(x.dtype), options.workspace));
  runner.run(p, plan, options.stream);
  const MixerSumList sums = sums_of(p);
  int64_t blocks = 0;
  for (const MixerSum& sum : sums.all) blocks += (int64_t(sum.rows) * sum.columns + kLanes - 1) / kLanes;
  launch("mixer_weights_kernel", mixer_weights_kernel, {blocks, kTileThreads, 1024}, options.stream, sums);
}

}  // namespace mirage::cuda
