// mixer_stage on a GPU: checks the arguments and selects the kernels.
#include "mirage/cuda/mixer_stage.h"

#include "arguments.h"
#include "common/cuda/call_checks.h"
#include "common/cuda/scratch.h"
#include "forward_launch.h"
#include "ops/mixer_stage/checks.h"

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

// Carves the workspace into the argument pointers and returns its size in bytes (null memory: size only).
int64_t carve_workspace(MixerArguments& p, const MixerPlan& plan, void* memory) {
  Scratch scratch(memory);
  p.parts = plan.parts;
  p.packed = static_cast<float*>(scratch.next(plan.packed_bytes));
  p.moments = static_cast<NormMoments*>(scratch.next(p.batch * p.plane() * sizeof(NormMoments)));
  p.partial = scratch.floats(int64_t(p.batch) * p.parts * p.partial_size());
  return scratch.used();
}

}  // namespace

MIRAGE_KERNELS(list) {
  for (const int tiles : kMixerChannelTiles) {
    mixer_runner<TensorCores16<f16>>(16 * tiles).list(list);
    mixer_runner<TensorCores16<bf16>>(16 * tiles).list(list);
    mixer_runner<TensorCoresTf32>(16 * tiles).list(list);
    mixer_runner<ExactFloat>(16 * tiles).list(list);
  }
}

std::string mixer_stage_problem(const Tensor& x, const Options& options) {
  if (const std::string problem = mixer_problem(x); !problem.empty()) return problem;
  if (x.size[1] > 3 * kMixerMostBranch) return std::to_string(x.size[1]) + " channels";
  return shared_memory_problem(runner_for(x, options).plan(mixer_sizes(x, 1, x.size[1] / 3)).shared_bytes);
}

int64_t mixer_stage_workspace(const Tensor& x, int64_t heads, int64_t hidden, const Options& options) {
  MixerArguments p = mixer_sizes(x, heads, hidden);
  return carve_workspace(p, runner_for(x, options).plan(p), nullptr);
}

void mixer_stage(const Tensor& x, const MixerWeights& w, const Tensor& branch_scale, const MixerOptions& mixer,
                 const MixerStatistics& statistics, const Tensor& y, const Options& options) {
  check_mixer_stage(x, w, branch_scale, statistics);
  check_dense("y", y, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3]});
  const std::string problem = mixer_stage_problem(x, options);
  if (!problem.empty()) fail("x", "what the CUDA kernels of mixer_stage take", problem);
  MixerArguments p = mixer_arguments(x, w, branch_scale, mixer, statistics);
  if (x.numel() == 0) return;
  p.y = y.data;
  const MixerRunner runner = runner_for(x, options);
  const MixerPlan plan = runner.plan(p);
  check_workspace(options, carve_workspace(p, plan, options.workspace));
  runner.run(p, plan, options.stream);
}

}  // namespace mirage::cuda
