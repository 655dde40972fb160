"""``transformer_blocks`` on the C++ library (csrc/ops/transformer_blocks/cpu.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirage_kernels._runtime.library import native, result, to_dlpack


def forward(x: Tensor, weights: Sequence[Tensor], eps: Sequence[float]) -> Tensor:
    y = result(x.shape, x.dtype)
    native().transformer_blocks(torch._C._to_dlpack, to_dlpack(x), weights, eps, to_dlpack(y))
    return y
