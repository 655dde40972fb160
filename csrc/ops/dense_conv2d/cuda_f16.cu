#define MIRAGE_INSTANTIATE
#include "cuda_launch.h"

namespace mirage::cuda {

template DenseConvRunner dense_conv_runner<TensorCores16<f16>>();

}  // namespace mirage::cuda
