"""``channel_attention`` in CUDA C++ (csrc/ops/channel_attention/cuda_kernels.h, attention_apply.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import is_exact, to_dlpack
from mirage_kernels.channel_attention.matrices import small_matrices


def forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    matrices = small_matrices(q, num_heads, q.dtype)
    tensors = (q, k, v, temperature.reshape(num_heads), out, matrices)
    size = cuda_runtime.on_device(q, "channel_attention_workspace", to_dlpack(q), num_heads)
    cuda_runtime.call("channel_attention_forward", tensors, size, tf32=not is_exact(q.dtype))
    return out, matrices


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    grad_temperature = torch.empty(temperature.shape, dtype=temperature.dtype, device=q.device)
    heads = matrices.shape[1]
    inputs = (grad_out, q, k, v, temperature.reshape(heads), matrices)
    size = cuda_runtime.on_device(q, "channel_attention_workspace", to_dlpack(q), heads)
    tensors = (*inputs, *grads, grad_temperature.view(heads))
    cuda_runtime.call("channel_attention_backward", tensors, size, tf32=not is_exact(q.dtype))
    return *grads, grad_temperature
