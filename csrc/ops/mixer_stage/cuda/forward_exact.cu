#define MIRAGE_INSTANTIATE
#include "forward_launch.h"

namespace mirage::cuda {

template MixerRunner mixer_runner<ExactFloat>(int branch);

}  // namespace mirage::cuda
