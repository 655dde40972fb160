// feed_forward_stage in two steps, for those who pack the weights of several stages in one launch. Arguments have been
// checked (ops/mixer_stage/checks.h), and feed_forward_stage_problem has found nothing.
#pragma once

#include "mirage/cuda/stream.h"
#include "mirage/transformer_blocks.h"

namespace mirage::cuda {

// Of the packed weights of a stage with M pairs, in steps that suit every type.
int64_t feed_forward_packed_bytes(const Tensor& x, int64_t pairs, const Options& options);

// Of the scratch memory that feed_forward_stage_packed needs.
int64_t feed_forward_packed_workspace(const Tensor& x, int64_t pairs, const Options& options);

// The weights of one stage and where they go: memory aligned to 256 bytes.
struct FeedForwardToPack {
  FeedForwardWeights weights;
  void* packed;
};

// Throws std::invalid_argument where a stage's weights have not one dtype, that of x or f32. The stages may differ in M.
void pack_feed_forward(const Tensor& x, const FeedForwardToPack* stages, int64_t count, const Options& options);

void feed_forward_stage_packed(const Tensor& x, double eps, int64_t pairs, const void* packed, const Tensor& y,
                               const Options& options);

}  // namespace mirage::cuda
