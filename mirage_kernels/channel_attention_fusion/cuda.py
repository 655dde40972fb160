"""``channel_attention_fusion`` in CUDA C++ (csrc/cuda/attention_apply.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels import _cuda_runtime
from mirage_kernels._library import dl, is_exact
from mirage_kernels.channel_attention.arguments import small_matrices
from mirage_kernels.tri_branch_fusion.arguments import concatenated, fusion_dtypes


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    num_heads: int,
    conv: Tensor,
    mlp: Tensor,
    l_att: Tensor,
    l_conv: Tensor,
    l_mlp: Tensor,
) -> tuple[Tensor, Tensor]:
    scalars = (l_att, l_conv, l_mlp)
    dtype, result = fusion_dtypes(q, conv, mlp, *scalars)
    out = torch.empty(concatenated(q), dtype=result, device=q.device)
    q, k, v, conv, mlp = (t.to(dtype) for t in (q, k, v, conv, mlp))
    matrices = small_matrices(q, num_heads, dtype)
    inputs = (q, k, v, temperature.reshape(num_heads), conv, mlp, *(t.reshape(1) for t in scalars))
    size = _cuda_runtime.on_device(q, "channel_attention_fusion_workspace", dl(q), num_heads)
    tensors = (*inputs, out, matrices)
    _cuda_runtime.call("channel_attention_fusion_forward", tensors, size, tf32=not is_exact(dtype))
    return out, matrices


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    conv: Tensor,
    mlp: Tensor,
    l_att: Tensor,
    l_conv: Tensor,
    l_mlp: Tensor,
    matrices: Tensor,
) -> tuple[Tensor, ...]:
    maps, scalars, heads = (q, k, v, conv, mlp), (l_att, l_conv, l_mlp), matrices.shape[1]
    dtype, _ = fusion_dtypes(q, conv, mlp, *scalars)
    grads = [torch.empty(t.shape, dtype=dtype, device=q.device) for t in maps]
    grad_temperature = torch.empty(temperature.shape, dtype=temperature.dtype, device=q.device)
    grads_l = [torch.empty(t.shape, dtype=t.dtype, device=q.device) for t in scalars]
    q, k, v, conv, mlp = (t.to(dtype) for t in maps)
    inputs = (q, k, v, temperature.reshape(heads), conv, mlp, *(t.reshape(1) for t in scalars), matrices)
    results = (*grads[:3], grad_temperature.view(heads), *grads[3:], *(t.view(1) for t in grads_l))
    size = _cuda_runtime.on_device(q, "channel_attention_fusion_workspace", dl(q), heads)
    tensors = (grad_out, *inputs, *results)
    _cuda_runtime.call("channel_attention_fusion_backward", tensors, size, tf32=not is_exact(dtype))
    grad_q, grad_k, grad_v, grad_conv, grad_mlp = (g.to(t.dtype) for g, t in zip(grads, maps, strict=True))
    return grad_q, grad_k, grad_v, grad_temperature, grad_conv, grad_mlp, *grads_l
