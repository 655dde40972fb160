// The launches over q and k that both attention operators make.
#include "common/cuda/registry.h"
#include "cuda_launch.h"

namespace mirage::cuda {

namespace {

struct TemperatureSums {
  const float* partial;  // [batch, heads]
  AnyVector grad_temperature;
  int batch, heads;
};

int64_t softmax_bytes(const AttentionArguments& p) {
  const int64_t entries = p.matrix() + 2 * p.d;
  return (entries + std::max<int64_t>(entries, kAttentionSoftmaxThreads)) * int64_t(sizeof(float));
}

int64_t softmax_backward_bytes(const AttentionArguments& p) {
  const int64_t entries = p.matrix();
  return (entries + std::max<int64_t>(entries, kAttentionSoftmaxThreads)) * int64_t(sizeof(float));
}

template <class ChannelTiles>
constexpr int64_t kGramBytes = sizeof(HeadTile<ChannelTiles::kChannelTiles>);
template <class ChannelTiles>
constexpr int64_t kInputsBytes = kGramBytes<ChannelTiles> + 2 * 256 * ChannelTiles::kChannelTiles *
                                                                ChannelTiles::kChannelTiles * int64_t(sizeof(float));

Grid heads_grid(const AttentionArguments& p, int64_t shared_bytes) {
  return {int64_t(p.batch) * p.heads, kAttentionSoftmaxThreads, shared_bytes};
}

}  // namespace

// Adds up the gradient over the samples, one thread per head.
MIRAGE_KERNEL(256) attention_temperature_kernel(const TemperatureSums p) {
  const int head = int(block_index()) * 256 + thread_index();
  if (head >= p.heads) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int sample = 0; sample < p.batch; ++sample) sum += p.partial[int64_t(sample) * p.heads + head];
  p.grad_temperature.set(head, sum);
}

MIRAGE_KERNELS(list) {
  AttentionArguments most{};
  most.d = kAttentionMostDepth;
  list.add<attention_softmax_kernel<kAttentionSoftmaxThreads>>(kAttentionSoftmaxThreads, softmax_bytes(most));
  list.add<attention_softmax_backward_kernel<kAttentionSoftmaxThreads>>(kAttentionSoftmaxThreads,
                                                                        softmax_backward_bytes(most));
  list.add<attention_temperature_kernel>(256, 0);
  with_every_head([&](auto kind, auto type, auto channel_tiles) {
    using Kind = decltype(kind);
    using ChannelTiles = decltype(channel_tiles);
    list.add<attention_gram_kernel<Kind, decltype(type), ChannelTiles::kChannelTiles>>(kAttentionThreads,
                                                                                       kGramBytes<ChannelTiles>);
    list.add<attention_inputs_kernel<Kind, decltype(type), ChannelTiles::kChannelTiles>>(kAttentionThreads,
                                                                                         kInputsBytes<ChannelTiles>);
  });
}

void attention_matrices(const Tensor& q, const Tensor& k, AttentionArguments p, const Options& options) {
  p.pixels = pixels_of("q", q, {&k});
  with_head(q.dtype, options.tf32, p.d, [&](auto kind, auto type, auto channel_tiles) {
    using ChannelTiles = decltype(channel_tiles);
    launch("attention_gram_kernel", attention_gram_kernel<decltype(kind), decltype(type), ChannelTiles::kChannelTiles>,
           attention_grid(p, kGramBytes<ChannelTiles>), options.stream, p);
  });
  launch("attention_softmax_kernel", attention_softmax_kernel<kAttentionSoftmaxThreads>,
         heads_grid(p, softmax_bytes(p)), options.stream, p);
}

void attention_matrices_backward(const Tensor& q, const Tensor& k, const Tensor& grad_q, const Tensor& grad_k,
                                 const Tensor& grad_temperature, AttentionArguments p, const Options& options) {
  if (q.numel() > 0) {
    launch("attention_softmax_backward_kernel", attention_softmax_backward_kernel<kAttentionSoftmaxThreads>,
           heads_grid(p, softmax_backward_bytes(p)), options.stream, p);
    p.pixels = pixels_of("q", q, {&k, &grad_q, &grad_k});
    p.grad_q = grad_q.data, p.grad_k = grad_k.data, p.parts = attention_runs(q);
    with_head(q.dtype, options.tf32, p.d, [&](auto kind, auto type, auto channel_tiles) {
      using ChannelTiles = decltype(channel_tiles);
      launch("attention_inputs_kernel",
             attention_inputs_kernel<decltype(kind), decltype(type), ChannelTiles::kChannelTiles>,
             attention_grid(p, kInputsBytes<ChannelTiles>), options.stream, p);
    });
  }
  const TemperatureSums sums{p.grad_scale, vector_of(grad_temperature), q.numel() > 0 ? p.batch : 0, p.heads};
  launch("attention_temperature_kernel", attention_temperature_kernel, {(p.heads + 255) / 256, 256, 0}, options.stream,
         sums);
}

}  // namespace mirage::cuda
