"""The tensors that the C++ and the CUDA library take for ``channel_attention_fusion``: inputs and results, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels.channel_attention.matrices import small_matrices
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes


def for_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    num_heads: int,
    conv: Tensor,
    mlp: Tensor,
    *scalars: Tensor,
) -> tuple[Tensor, ...]:
    """The result and the matrices for backward, which are to be filled, come last."""
    dtype, result = fusion_dtypes(q, conv, mlp, *scalars)
    out = torch.empty(concatenated(q), dtype=result, device=q.device)
    q, k, v, conv, mlp = (t.to(dtype) for t in (q, k, v, conv, mlp))
    matrices = small_matrices(q, num_heads, dtype)
    return q, k, v, temperature.reshape(num_heads), conv, mlp, *(t.reshape(1) for t in scalars), out, matrices


def for_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, conv: Tensor, mlp: Tensor, *rest: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`rest`: the three weights and the matrices. The tensors, and the gradients among them that are to be filled, as
    :func:`gradients` takes them."""
    *scalars, matrices = rest
    maps, heads = (q, k, v, conv, mlp), matrices.shape[1]
    dtype, _ = fusion_dtypes(q, conv, mlp, *scalars)
    of_q, of_k, of_v, of_conv, of_mlp = (torch.empty(t.shape, dtype=dtype, device=q.device) for t in maps)
    parameters = (temperature, *scalars)
    of_temperature, *of_scalars = (torch.empty(t.shape, dtype=t.dtype, device=q.device) for t in parameters)
    q, k, v, conv, mlp = (t.to(dtype) for t in maps)
    inputs = (grad_out, q, k, v, temperature.reshape(heads), conv, mlp, *(t.reshape(1) for t in scalars), matrices)
    filled = (of_q, of_k, of_v, of_temperature, of_conv, of_mlp, *of_scalars)
    results = (of_q, of_k, of_v, of_temperature.view(heads), of_conv, of_mlp, *(t.view(1) for t in of_scalars))
    return (*inputs, *results), filled


def gradients(filled: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    """In the dtypes of what they are gradients of."""
    return tuple(grad.to(t.dtype) for grad, t in zip(filled, inputs, strict=True))
