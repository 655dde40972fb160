"""``channel_attention`` on the C++ library (csrc/ops/channel_attention/cpu_kernels.cpp)."""

import torch
from torch import Tensor

from mirage_kernels._runtime.library import native, result, to_dlpack
from mirage_kernels.channel_attention.matrices import small_matrices


def forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    out = result(q.shape, q.dtype)
    matrices = small_matrices(q, num_heads, q.dtype)
    native().channel_attention_forward(*map(to_dlpack, (q, k, v, temperature.reshape(num_heads), out, matrices)))
    return out, matrices


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [result(q.shape, q.dtype) for _ in range(3)]
    grad_temperature = torch.empty(temperature.shape, dtype=temperature.dtype)
    heads = matrices.shape[1]
    inputs = (grad_out, q, k, v, temperature.reshape(heads), matrices)
    native().channel_attention_backward(*map(to_dlpack, (*inputs, *grads, grad_temperature.view(heads))))
    return *grads, grad_temperature
