#define MIRAGE_INSTANTIATE
#include "forward_launch.h"

namespace mirage::cuda {

template FeedForwardRunner feed_forward_runner<TensorCores16<bf16>>(int channels);

}  // namespace mirage::cuda
