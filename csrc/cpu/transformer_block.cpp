// transformer_block on the CPU: the stages in order, with room for the statistics that nobody will ask for.
#include "mirage/transformer_block.h"

#include "mirage/feed_forward_stage.h"
#include "stage_checks.h"
#include "workspace.h"

namespace mirage {
namespace {

// Room for tensors of one type, one after the other.
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

}  // namespace

void transformer_block(const Tensor& x, const MixerWeights& mixer, const FeedForwardWeights& feed_forward,
                       const BlockOptions& options, const Tensor& y) {
  const FeedForwardWeights& f = feed_forward;
  check_feed_forward_stage(x, f.norm_weight, f.norm_bias, f.project_in, f.dwconv, f.project_out);
  check_ndim("temperature", mixer.temperature, 1);
  const int64_t batch = x.size[0], c = x.size[1] / 3, heads = mixer.temperature.size[0];
  if (heads == 0 || c % heads) fail("temperature", "a divisor of " + std::to_string(c), shape_of(mixer.temperature));
  if (x.data == y.data && x.numel() != 0) fail("y", "memory other than that of x", "the same");
  const int64_t depth = c / heads, attention = heads * (2 * depth + 2) * depth;
  constexpr int64_t kTaps = kMixerKernelSize * kMixerKernelSize;
  Room room(accumulator_of(x.dtype), batch * (attention + c * (kTaps + 1) + 1) + 2 * c);
  const MixerStatistics statistics{room.next({batch, heads, 2 * depth + 2, depth}), room.next({batch, c, kTaps}),
                                   room.next({batch, c}), room.next({c}), room.next({c})};
  const Tensor branch_scale = room.next({batch});
  for (int64_t b = 0; b < batch; ++b) {
    if (branch_scale.dtype == DType::f64) branch_scale.as<double>()[b] = 1;
    else branch_scale.as<float>()[b] = 1;
  }
  mixer_stage(x, mixer, branch_scale, {false, options.norm1_eps, options.bn_eps}, statistics, y);
  feed_forward_stage(y, f.norm_weight, f.norm_bias, options.norm2_eps, f.project_in, f.dwconv, f.project_out, y);
}

}  // namespace mirage
