// transformer_blocks on a GPU: runs the stages one after the other, with workspace for the activations between them and
// for the mixer's statistics, which are discarded.
#include "mirage/cuda/transformer_blocks.h"

#include <algorithm>
#include <vector>

#include "common/cuda/call_checks.h"
#include "common/cuda/scratch.h"
#include "mirage/cuda/feed_forward_stage.h"
#include "mirage/cuda/mixer_stage.h"
#include "ops/feed_forward_stage/checks.h"
#include "ops/feed_forward_stage/cuda/pack.h"
#include "ops/mixer_stage/checks.h"

namespace mirage::cuda {

namespace {

constexpr int64_t kTaps = kMixerKernelSize * kMixerKernelSize;

Tensor next_tensor(Scratch& scratch, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor t;
  t.dtype = dtype;
  for (int64_t size : shape) t.size[t.ndim++] = size;
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; --d) t.stride[d] = stride, stride *= t.size[d];
  t.data = scratch.next(stride * bytes_of(dtype));
  return t;
}

// The workspace that the blocks share, and their packed weights.
struct Memory {
  Tensor middle, between;  // activations after a block's first half, and between blocks
  std::vector<FeedForwardToPack> feed_forward;
  MixerStatistics statistics;
  Options options;  // with the workspace of the stages

  Memory(const Tensor& x, const BlockWeights* blocks, int64_t count, const Options& given, Scratch& scratch)
      : options(given) {
    const int64_t batch = x.size[0], c = x.size[1] / 3;
    middle = next_tensor(scratch, x.dtype, {batch, x.size[1], x.size[2], x.size[3]});
    if (count > 1) between = next_tensor(scratch, x.dtype, {batch, x.size[1], x.size[2], x.size[3]});
    int64_t attention = 0;  // the largest of all blocks, whose shapes may differ
    options.workspace_bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t heads = heads_of(x, blocks[i].mixer), depth = c / heads;
      check_ndim("gic2", blocks[i].mixer.gic2, 2);
      const int64_t hidden = blocks[i].mixer.gic2.size[1];
      const FeedForwardWeights& f = blocks[i].feed_forward;
      check_ndim("project_out", f.project_out, 2);
      const int64_t pairs = f.project_out.size[1];
      feed_forward.push_back({f, scratch.next(feed_forward_packed_bytes(x, pairs, given))});
      attention = std::max(attention, batch * heads * (2 * depth + 2) * depth);
      options.workspace_bytes =
          std::max({options.workspace_bytes, mixer_stage_workspace(x, heads, hidden, given),
                    feed_forward_packed_workspace(x, pairs, given)});
    }
    const auto floats = [&](std::initializer_list<int64_t> shape) { return next_tensor(scratch, DType::f32, shape); };
    statistics = {floats({attention}), floats({batch, c, kTaps}), floats({batch, c}), floats({c}), floats({c})};
    options.workspace = scratch.next(options.workspace_bytes);
  }

  MixerStatistics of(const Tensor& x, const MixerWeights& w) const {
    const int64_t heads = heads_of(x, w), depth = x.size[1] / 3 / heads, rows = 2 * depth + 2;
    MixerStatistics s = statistics;
    s.attention = {statistics.attention.data, DType::f32, 4, {x.size[0], heads, rows, depth},
                   {heads * rows * depth, rows * depth, depth, 1}};
    return s;
  }
};

}  // namespace

std::string transformer_blocks_problem(const Tensor& x, const BlockWeights* blocks, int64_t count,
                                       const Options& options) {
  check_ndim("x", x, 4);
  std::string problem = mixer_stage_problem(x, options);
  for (int64_t i = 0; i < count && problem.empty(); ++i) {
    check_ndim("project_out", blocks[i].feed_forward.project_out, 2);
    problem = feed_forward_stage_problem(x, blocks[i].feed_forward.project_out, options);
  }
  return problem;
}

int64_t transformer_blocks_workspace(const Tensor& x, const BlockWeights* blocks, int64_t count,
                                     const Options& options) {
  Scratch scratch(nullptr);
  Memory(x, blocks, count, options, scratch);
  return scratch.used();
}

void transformer_blocks(const Tensor& x, const BlockWeights* blocks, int64_t count, const Tensor& y,
                        const Options& options) {
  if (count < 1) fail("blocks", "at least one", std::to_string(count));
  check_ndim("x", x, 4);
  if (x.data == y.data && x.numel() != 0) fail("y", "memory other than that of x", "the same");
  for (int64_t i = 0; i < count; ++i) {
    check_feed_forward_stage_of_mirage(x, blocks[i].feed_forward);
  }
  const std::string problem = transformer_blocks_problem(x, blocks, count, options);
  if (!problem.empty()) fail("x", "what the CUDA kernels of transformer_blocks take", problem);
  Scratch scratch(options.workspace);
  const Memory memory(x, blocks, count, options, scratch);
  check_workspace(options, scratch.used());
  pack_feed_forward(x, memory.feed_forward.data(), count, options);
  const Tensor no_scale{nullptr, DType::f32, 1, {x.size[0]}, {1}};
  Tensor in = x;
  for (int64_t i = 0; i < count; ++i) {
    const BlockWeights& block = blocks[i];
    mixer_stage(in, block.mixer, no_scale, {false, block.norm1_eps, block.bn_eps}, memory.of(x, block.mixer),
                memory.middle, memory.options);
    const Tensor& out = i + 1 < count ? memory.between : y;
    feed_forward_stage_packed(memory.middle, block.norm2_eps, block.feed_forward.project_out.size[1],
                              memory.feed_forward[size_t(i)].packed, out, memory.options);
    in = out;
  }
}

}  // namespace mirage::cuda
