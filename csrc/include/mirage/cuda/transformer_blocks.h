// MIRAGE blocks one after the other on a GPU, without gradients: four launches each (five where images are small) after
// one for the weights of sixteen, from one call. mirage/transformer_blocks.h says what is computed; tensors live on the
// current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/transformer_blocks.h"

namespace mirage::cuda {

// Why these cannot be computed here, in a few words; empty where they can. See ops/mixer_stage/cuda/shared.h and ops/feed_forward_stage/cuda/forward.h.
std::string transformer_blocks_problem(const Tensor& x, const BlockWeights* blocks, int64_t count,
                                       const Options& options);

// Bytes of scratch memory that transformer_blocks needs: up to two maps like x, weights packed for the
// kernels, and what the stages need.
int64_t transformer_blocks_workspace(const Tensor& x, const BlockWeights* blocks, int64_t count, const Options& options);

// y: contiguous, dtype and shape of x, no memory in common with it. Runs on options.stream. Throws std::invalid_argument as
// the CPU library does, std::runtime_error where a launch fails.
void transformer_blocks(const Tensor& x, const BlockWeights* blocks, int64_t count, const Tensor& y,
                        const Options& options);

}  // namespace mirage::cuda
