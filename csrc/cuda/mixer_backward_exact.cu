#define MIRAGE_INSTANTIATE
#include "mixer_backward_launch.h"

namespace mirage::cuda {

template MixerBackwardRunner mixer_backward_runner<ExactFloat>(int branch, int64_t limit);

}  // namespace mirage::cuda
