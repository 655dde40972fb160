"""``feed_forward_stages`` on the C++ library (csrc/ops/feed_forward_stages/cpu.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mirage_kernels._runtime.library import native, result, to_dlpack
from mirage_kernels.feed_forward_stages.weights import with_absent


def forward(x: Tensor, tensors: Sequence[Tensor], present: Sequence[int], eps: Sequence[float], *form: str) -> Tensor:
    """`form`: names of the norm, the activation and the gate."""
    y = result(x.shape, x.dtype)
    native().feed_forward_stages(to_dlpack, to_dlpack(x), with_absent(tensors, present), eps, *form, to_dlpack(y))
    return y
