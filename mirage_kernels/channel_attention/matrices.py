"""The small matrices of a head that forward keeps for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator


def small_matrices(q: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """What forward keeps for backward, uninitialised: [B, heads, 2 d + 2, d], per head d rows of attn (the softmax),
    d rows of q k^T, |q| and |k|, for sums over elements of `dtype`."""
    d = q.shape[1] // num_heads
    return q.new_empty((q.shape[0], num_heads, 2 * d + 2, d), dtype=accumulator(dtype))
