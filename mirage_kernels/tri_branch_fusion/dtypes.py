"""The dtypes in which both fusing operators compute, and the shape of their result."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def fusion_dtypes(*tensors: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype in which the branches are read, and that of the result: as the reference promotes.

    `tensors` are the branches and the scalars; the scalars promote when they have a dimension. The two dtypes are the
    same, or the first has 16 bits and the second is float32.
    """
    first = tensors[0].dtype
    if all(t.dtype == first for t in tensors):
        return first, first
    branches = reduce(torch.promote_types, (t.dtype for t in tensors if t.dim() > 1))
    result = reduce(torch.promote_types, (t.dtype for t in tensors if t.dim() == 1), branches)
    return (result if result == torch.float64 else branches), result


def concatenated(branch: Tensor) -> tuple[int, int, int, int]:
    batch, channels, height, width = branch.shape
    return batch, 3 * channels, height, width


def widest(*tensors: Tensor) -> Tensor:
    """The first float64 tensor, or the first: what an implementation has to be able to take."""
    for t in tensors:  # not next() with a default, which Dynamo does not know before torch 2.7
        if t.dtype == torch.float64:
            return t
    return tensors[0]
