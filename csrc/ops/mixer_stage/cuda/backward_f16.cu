#define MIRAGE_INSTANTIATE
#include "backward_launch.h"

namespace mirage::cuda {

template MixerBackwardRunner mixer_backward_runner<TensorCores16<f16>>(int branch, int64_t limit);

}  // namespace mirage::cuda
