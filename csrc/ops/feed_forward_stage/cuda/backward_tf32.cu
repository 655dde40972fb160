#define MIRAGE_INSTANTIATE
#include "backward_launch.h"

namespace mirage::cuda {

template FeedForwardBackwardRunner feed_forward_backward_runner<TensorCoresTf32>(int channels, int64_t limit);

}  // namespace mirage::cuda
