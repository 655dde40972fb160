#define MIRAGE_INSTANTIATE
#include "forward_launch.h"

namespace mirage::cuda {

template MixerRunner mixer_runner<TensorCores16<bf16>>(int branch);

}  // namespace mirage::cuda
