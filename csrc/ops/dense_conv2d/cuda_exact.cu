#define MIRAGE_INSTANTIATE
#include "cuda_launch.h"

namespace mirage::cuda {

template DenseConvRunner dense_conv_runner<ExactFloat>();

}  // namespace mirage::cuda
