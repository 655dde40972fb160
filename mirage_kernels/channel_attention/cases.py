"""What is true of ``channel_attention``. A shape is [B, C, H, W, heads]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, at_levels, pixels, randn

# what channel_attention_fusion has in common
SHAPES: tuple[Shape, ...] = (
    (2, 8, 5, 7, 2),
    (1, 3, 1, 1, 3),  # one channel per head, one pixel: softmax of one element
    (1, 10, 1, 13, 2),
    (2, 8, 11, 1, 1),
    (1, 3, 4, 5, 1),
    (1, 24, 16, 17, 1),
    (1, 20, 9, 9, 4),
    (1, 6, 33, 47, 1),
)
EMPTY: Shape = (0, 8, 5, 7, 2)
LARGE: Shape = (1, 8, 1024, 1024, 2)
COMPILED: tuple[Shape, ...] = ((1, 64, 224, 224, 1),)  # as many channels of a head as there are kernels for
in_network = at_levels(lambda level: (1, level.channels // 3, level.height, level.width, level.heads))


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    """k resembles q, so that the softmax is far from uniform."""
    *of_map, heads = shape
    q, noise, v = (randn(*of_map, generator=generator) for _ in range(3))
    return q, q + noise, v + 0.3, 1 + 4 * torch.rand(heads, 1, 1, generator=generator, dtype=torch.float64)


def flops(q: Shape, k: Shape, v: Shape, temperature: Shape, *_: Any) -> int:
    """q k^T and the attention times v, with d = C / heads channels of each head."""
    return 2 * 2 * pixels(q) * q[1] * (q[1] // temperature[0])


def call(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *rest: Any) -> Tensor:
    return function(q, k, v, temperature, temperature.shape[0], *rest)


CASES = (
    Operator(
        name="channel_attention",
        arguments=("q", "k", "v", "temperature"),
        make=make,
        shapes=SHAPES,
        empty=EMPTY,
        large=LARGE,
        in_network=in_network,
        flops=flops,
        call=call,
        compiled=COMPILED,
    ),
)
