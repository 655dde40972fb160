#define MIRAGE_INSTANTIATE
#include "feed_forward_stage_launch.h"

namespace mirage::cuda {

template FeedForwardRunner feed_forward_runner<ExactFloat>(int channels);

}  // namespace mirage::cuda
