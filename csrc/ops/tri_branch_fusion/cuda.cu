// tri_branch_fusion on a GPU: checks the arguments and launches the kernels.
#include "mirage/cuda/tri_branch_fusion.h"

#include <algorithm>

#include "common/cuda/registry.h"
#include "cuda_launch.h"

namespace mirage::cuda {

namespace {

struct WeightSums {
  const float* partial;  // [count, 3]
  int64_t count;
  AnyVector grad_weight[3];
};

constexpr int64_t kReduceBytes = kFusionThreads / kLanes * int64_t(sizeof(float));  // of block_all_reduce_sum

FusionArguments arguments_of(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                             const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out) {
  check_kernel_dtype("att", att);
  FusionArguments p{};
  p.branch[0] = map_of(att), p.branch[1] = map_of(conv), p.branch[2] = map_of(mlp);
  p.weight[0] = vector_of(l_att), p.weight[1] = vector_of(l_conv), p.weight[2] = vector_of(l_mlp);
  p.pixels = pixels_of("att", att, {&conv, &mlp, &out});
  p.channels = int(att.size[1]), p.planes = att.size[0] * att.size[1];
  return p;
}

// Parts: four blocks per SM.
int parts_of(const FusionArguments& p) {
  return int(std::min<int64_t>(p.planes * fusion_runs(p), 4 * multiprocessors()));
}

}  // namespace

// Adds up the gradients of the weights over all parts, in one block.
MIRAGE_KERNEL(256) fusion_weights_kernel(const WeightSums p) {
  float* buffer = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    float sum = 0.0f;
    for (int64_t n = thread_index(); n < p.count; n += kFusionThreads) sum += p.partial[3 * n + i];
    sum = block_all_reduce_sum<kFusionThreads>(sum, buffer);
    if (thread_index() == 0) p.grad_weight[i].set(0, sum);
  }
}

void sum_fusion_weights(const float* partial, int64_t count, const AnyVector (&grad_weight)[3], void* stream) {
  const WeightSums sums{partial, count, {grad_weight[0], grad_weight[1], grad_weight[2]}};
  launch("fusion_weights_kernel", fusion_weights_kernel, {1, kFusionThreads, kReduceBytes}, stream, sums);
}

MIRAGE_KERNELS(list) {
  list.add<fusion_weights_kernel>(kFusionThreads, kReduceBytes);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const DType out : {dtype, DType::f32}) {
      with_fusion_types(dtype, out, [&](auto type, auto of_out) {
        list.add<tri_branch_fusion_kernel<decltype(type), decltype(of_out)>>(kFusionThreads, 0);
        list.add<tri_branch_fusion_backward_kernel<decltype(type), decltype(of_out)>>(kFusionThreads, kReduceBytes);
      });
    }
  }
}

void tri_branch_fusion_forward(const Tensor& att, const Tensor& conv, const Tensor& mlp, const Tensor& l_att,
                               const Tensor& l_conv, const Tensor& l_mlp, const Tensor& out, const Options& options) {
  check_tri_branch_fusion(att, conv, mlp, l_att, l_conv, l_mlp, out);
  FusionArguments p = arguments_of(att, conv, mlp, l_att, l_conv, l_mlp, out);
  if (att.numel() == 0) return;
  p.out = out.data;
  with_fusion_types(att.dtype, out.dtype, [&](auto type, auto of_out) {
    launch("tri_branch_fusion_kernel", tri_branch_fusion_kernel<decltype(type), decltype(of_out)>,
           {p.planes * fusion_runs(p), kFusionThreads, 0}, options.stream, p);
  });
}

int64_t tri_branch_fusion_backward_workspace(const Tensor& att) {
  check_ndim("att", att, 4);
  return 3 * 4 * int64_t(multiprocessors()) * int64_t(sizeof(float));
}

void tri_branch_fusion_backward(const Tensor& grad_out, const Tensor& att, const Tensor& conv, const Tensor& mlp,
                                const Tensor& l_att, const Tensor& l_conv, const Tensor& l_mlp, const Tensor& grad_att,
                                const Tensor& grad_conv, const Tensor& grad_mlp, const Tensor& grad_l_att,
                                const Tensor& grad_l_conv, const Tensor& grad_l_mlp, const Options& options) {
  check_tri_branch_fusion_backward(grad_out, att, conv, mlp, l_att, l_conv, l_mlp, grad_att, grad_conv, grad_mlp,
                                   grad_l_att, grad_l_conv, grad_l_mlp);
  FusionArguments p = arguments_of(att, conv, mlp, l_att, l_conv, l_mlp, grad_out);
  p.pixels = pixels_of("att", att, {&conv, &mlp, &grad_out, &grad_att, &grad_conv, &grad_mlp});
  check_workspace(options, tri_branch_fusion_backward_workspace(att));
  p.grad_out = map_of(grad_out);
  p.grad_branch[0] = grad_att.data, p.grad_branch[1] = grad_conv.data, p.grad_branch[2] = grad_mlp.data;
  p.partial = static_cast<float*>(options.workspace);
  if (att.numel() > 0) {
    p.parts = parts_of(p);
    with_fusion_types(att.dtype, grad_out.dtype, [&](auto type, auto of_out) {
      launch("tri_branch_fusion_backward_kernel", tri_branch_fusion_backward_kernel<decltype(type), decltype(of_out)>,
             {p.parts, kFusionThreads, kReduceBytes}, options.stream, p);
    });
  }
  const AnyVector grads[3] = {vector_of(grad_l_att), vector_of(grad_l_conv), vector_of(grad_l_mlp)};
  sum_fusion_weights(p.partial, p.parts, grads, options.stream);
}

}  // namespace mirage::cuda
