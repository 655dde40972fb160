"""``transformer_block`` on the C++ library (csrc/cpu/transformer_block.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._library import dl, native, result


def forward(
    x: Tensor,
    mixer: tuple[Tensor, ...],
    feed_forward: tuple[Tensor, ...],
    norm1_eps: float,
    bn_eps: float,
    norm2_eps: float,
) -> Tensor:
    y = result(x.shape, x.dtype)
    native().transformer_block(
        torch._C._to_dlpack, dl(x), mixer, feed_forward, norm1_eps, bn_eps, norm2_eps, dl(y)
    )
    return y
