// A sequence of MIRAGE blocks on a GPU, without gradients, in one call: four launches per block (five for small
// images), and one per sixteen blocks that packs their weights. mirage/transformer_blocks.h defines it. Tensors are on
// the current device.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/transformer_blocks.h"

namespace mirage::cuda {

// Why this problem has no kernel, in a few words; empty if it has one. See ops/mixer_stage/cuda/shared.h and
// ops/feed_forward_stage/cuda/forward.h.
std::string transformer_blocks_problem(const Tensor& x, const BlockWeights* blocks, int64_t count,
                                       const Options& options);

// Bytes of workspace for transformer_blocks: up to two activations like x, packed weights, and the workspace of the
// stages.
int64_t transformer_blocks_workspace(const Tensor& x, const BlockWeights* blocks, int64_t count, const Options& options);

// y: contiguous, dtype and shape of x, not overlapping it. Runs on options.stream. Throws std::invalid_argument as the
// CPU library does, and std::runtime_error if a launch fails.
void transformer_blocks(const Tensor& x, const BlockWeights* blocks, int64_t count, const Tensor& y,
                        const Options& options);

}  // namespace mirage::cuda
