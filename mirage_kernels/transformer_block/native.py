"""``transformer_block`` on the C++ library (csrc/cpu/transformer_block.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mirage_kernels._library import dl, native, result


def forward(
    x: Tensor,
    mixer: Sequence[Tensor],
    feed_forward: Sequence[Tensor],
    norm1_eps: float,
    bn_eps: float,
    norm2_eps: float,
) -> Tensor:
    y = result(x.shape, x.dtype)
    weights = [dl(t.contiguous()) for t in mixer], [dl(t.contiguous()) for t in feed_forward]
    native().transformer_block(dl(x), *weights, norm1_eps, bn_eps, norm2_eps, dl(y))
    return y
