#define MIRAGE_INSTANTIATE
#include "dense_conv2d_launch.h"

namespace mirage::cuda {

template DenseConvRunner dense_conv_runner<ExactFloat>();

}  // namespace mirage::cuda
