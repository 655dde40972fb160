// feed_forward_stages on the CPU: one stage after the other, over the result of the one before where that can be.
#include <optional>
#include <string>

#include "common/cpu/room.h"
#include "mirage/feed_forward_stage.h"
#include "ops/feed_forward_stage/checks.h"

namespace mirage {

void feed_forward_stages(const Tensor& x, const FeedForward* stages, int64_t count, const Tensor& y) {
  if (count < 1) fail("stages", "at least one", std::to_string(count));
  if (x.data == y.data && x.numel() != 0) fail("y", "memory other than that of x", "the same");
  int64_t moves = 0;  // stages whose result is in another map than what they read
  const auto is_move = [&](int64_t i) { return i == 0 || exists(stages[i].weights.excite); };
  for (int64_t i = 0; i < count; ++i) {
    check_feed_forward_stage(x, stages[i].weights);
    moves += is_move(i);
  }
  std::optional<cpu::Room> room;
  Tensor other;
  if (moves > 1) other = room.emplace(x.dtype, x.numel()).next({x.size[0], x.size[1], x.size[2], x.size[3]});
  Tensor in = x;
  for (int64_t i = 0; i < count; ++i) {
    Tensor out = in;
    if (is_move(i)) out = moves-- % 2 ? y : other;  // the last is y
    feed_forward_stage(in, stages[i].weights, stages[i].options, out, nullptr, stages[i].scale);
    in = out;
  }
}

}  // namespace mirage
