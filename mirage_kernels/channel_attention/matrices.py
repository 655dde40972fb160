"""The small matrices of a head that forward keeps for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator

NORM_EPS = 1e-12  # of F.normalize


def small_matrices(q: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """What forward keeps for backward, uninitialised: [B, heads, 2 d + 2, d], per head d rows of attn (the softmax),
    d rows of q k^T, |q| and |k|, for sums over elements of `dtype`."""
    d = q.shape[1] // num_heads
    return q.new_empty((q.shape[0], num_heads, 2 * d + 2, d), dtype=accumulator(dtype))


def plain_matrices(q: Tensor, k: Tensor, temperature: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """`small_matrices` filled in by PyTorch."""
    q, k = (t.to(accumulator(dtype)).unflatten(1, (num_heads, -1)).flatten(3) for t in (q, k))
    gram, norms = q @ k.mT, [t.square().sum(-1).sqrt() for t in (q, k)]
    cosines = gram / norms[0].clamp_min(NORM_EPS).unsqueeze(-1) / norms[1].clamp_min(NORM_EPS).unsqueeze(-2)
    attn = (cosines * temperature.reshape(num_heads, 1, 1)).softmax(-1)
    return torch.cat((attn.to(gram.dtype), gram, *(n.unsqueeze(2) for n in norms)), 2)
