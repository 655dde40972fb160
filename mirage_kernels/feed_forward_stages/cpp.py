"""``feed_forward_stages`` on the C++ library (csrc/ops/feed_forward_stages/cpu.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mirage_kernels._runtime.library import native, result, to_dlpack


def forward(x: Tensor, tensors: Sequence[Tensor | None], eps: Sequence[float], form: tuple[str, str, str]) -> Tensor:
    """`form`: names of the norm, the activation and the gate."""
    y = result(x.shape, x.dtype)
    native().feed_forward_stages(to_dlpack, to_dlpack(x), tensors, eps, *form, to_dlpack(y))
    return y
