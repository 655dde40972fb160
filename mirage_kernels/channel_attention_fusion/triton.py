"""``channel_attention_fusion`` in Triton: the launches of ``channel_attention``, whose passes over v fuse the branches
in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels.channel_attention.triton.backward import apply_backward, attention_matrices_backward
from mirage_kernels.channel_attention.triton.forward import Branches, apply, attention_matrices
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes


def forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int, *branches: Tensor
) -> tuple[Tensor, Tensor]:
    """`branches`: conv, mlp, l_att, l_conv, l_mlp."""
    matrices, fused_with = attention_matrices(q, k, temperature, num_heads), Branches(*branches)
    result = fusion_dtypes(q, fused_with.conv, fused_with.mlp, *fused_with.scalars)[1]
    out = torch.empty(concatenated(q), dtype=result, device=q.device)
    apply(v, matrices, out, fused_with)
    return out, matrices


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *branches_and_matrices: Tensor
) -> tuple[Tensor, ...]:
    *branches, matrices = branches_and_matrices
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sums, tile, of_branches = apply_backward(grad_out, v, matrices, grad_v, Branches(*branches))
    grad_q, grad_k, grad_temperature = attention_matrices_backward(sums, tile, q, k, temperature, matrices)
    return grad_q, grad_k, grad_v, grad_temperature, *of_branches
