// transformer_blocks on the CPU: runs the stages one after the other, with workspace for the mixer's statistics, which
// are discarded.
#include "mirage/transformer_blocks.h"

#include "common/cpu/workspace.h"
#include "mirage/feed_forward_stage.h"
#include "ops/feed_forward_stage/checks.h"
#include "ops/mixer_stage/checks.h"

namespace mirage {
namespace {

// Allocates tensors of one type, one after the other, from a workspace.
class Room {
 public:
  Room(DType dtype, int64_t elements) : dtype_(dtype), memory_(cpu::take_workspace(size_t(elements * bytes_of(dtype)))) {}
  ~Room() { cpu::put_workspace(memory_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  Tensor next(std::initializer_list<int64_t> shape) {
    Tensor t;
    t.data = static_cast<char*>(memory_.data) + used_ * bytes_of(dtype_);
    t.dtype = dtype_;
    for (int64_t n : shape) t.size[t.ndim++] = n;
    int64_t stride = 1;
    for (int d = t.ndim - 1; d >= 0; --d) {
      t.stride[d] = stride;
      stride *= t.size[d];
    }
    used_ += stride;
    return t;
  }

 private:
  const DType dtype_;
  const cpu::Workspace memory_;
  int64_t used_ = 0;
};

void run(const Tensor& x, const BlockWeights& block, const Tensor& y) {
  constexpr int64_t kTaps = kMixerKernelSize * kMixerKernelSize;
  const int64_t batch = x.size[0], c = x.size[1] / 3, heads = heads_of(x, block.mixer), depth = c / heads;
  Room room(accumulator_of(x.dtype), batch * (heads * (2 * depth + 2) * depth + c * (kTaps + 1) + 1) + 2 * c);
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
  Room room(x.dtype, x.numel());
  const Tensor other = room.next({x.size[0], x.size[1], x.size[2], x.size[3]});
  Tensor in = x;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& out = (count - i) % 2 ? y : other;  // the last is y
    run(in, blocks[i], out);
    in = out;
  }
}

}  // namespace mirage
