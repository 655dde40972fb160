// transformer_blocks on the CPU: runs the stages one after the other, with workspace for the mixer's statistics, which
// are discarded.
#include "mirage/transformer_blocks.h"

#include "common/cpu/room.h"
#include "mirage/feed_forward_stage.h"
#include "ops/feed_forward_stage/checks.h"
#include "ops/mixer_stage/checks.h"

namespace mirage {
namespace {

void run(const Tensor& x, const BlockWeights& block, const Tensor& y) {
  constexpr int64_t kTaps = kMixerKernelSize * kMixerKernelSize;
  const int64_t batch = x.size[0], c = x.size[1] / 3, heads = heads_of(x, block.mixer), depth = c / heads;
  cpu::Room room(accumulator_of(x.dtype), batch * (heads * (2 * depth + 2) * depth + c * (kTaps + 1) + 1) + 2 * c);
  const MixerStatistics statistics{room.next({batch, heads, 2 * depth + 2, depth}), room.next({batch, c, kTaps}),
                                   room.next({batch, c}), room.next({c}), room.next({c})};
  const Tensor branch_scale = room.next({batch});
  for (int64_t b = 0; b < batch; ++b) {
    if (branch_scale.dtype == DType::f64) branch_scale.as<double>()[b] = 1;
    else branch_scale.as<float>()[b] = 1;
  }
  mixer_stage(x, block.mixer, branch_scale, {false, block.norm1_eps, block.bn_eps}, statistics, y);
  feed_forward_stage(y, block.feed_forward, {block.norm2_eps}, y);
}

}  // namespace

void transformer_blocks(const Tensor& x, const BlockWeights* blocks, int64_t count, const Tensor& y) {
  if (count < 1) fail("blocks", "at least one", std::to_string(count));
  if (x.data == y.data && x.numel() != 0) fail("y", "memory other than that of x", "the same");
  for (int64_t i = 0; i < count; ++i) {
    check_feed_forward_stage_of_mirage(x, blocks[i].feed_forward);
    heads_of(x, blocks[i].mixer);
  }
  if (count == 1) return run(x, blocks[0], y);
  cpu::Room room(x.dtype, x.numel());
  const Tensor other = room.next({x.size[0], x.size[1], x.size[2], x.size[3]});
  Tensor in = x;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& out = (count - i) % 2 ? y : other;  // the last is y
    run(in, blocks[i], out);
    in = out;
  }
}

}  // namespace mirage
