#define MIRAGE_INSTANTIATE
#include "forward_launch.h"

namespace mirage::cuda {

template MixerRunner mixer_runner<TensorCores16<f16>>(int branch);

}  // namespace mirage::cuda
