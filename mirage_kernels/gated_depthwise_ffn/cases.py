"""What is true of ``gated_depthwise_ffn``. A shape is [B, 2M, H, W]."""

from __future__ import annotations

import math
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, at_levels, randn


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    return randn(*shape, generator=generator) * 1.5, randn(shape[1], 1, 3, 3, generator=generator) / 2


def flops(h: Shape, *_: Any) -> int:
    """The depthwise convolution: nine multiply-adds for each element of h."""
    return 2 * 9 * math.prod(h)


CASES = (
    Operator(
        name="gated_depthwise_ffn",
        arguments=("h", "weight"),
        make=make,
        shapes=(
            (2, 6, 5, 7),
            (1, 2, 1, 1),
            (1, 4, 1, 19),
            (2, 2, 17, 1),
            (1, 6, 2, 2),
            (1, 4, 13, 16),
            (3, 10, 3, 3),
            (1, 4, 67, 35),
        ),
        empty=(0, 6, 5, 7),
        large=(1, 2, 1024, 1024),
        in_network=at_levels(lambda level: (1, 4 * level.channels, level.height, level.width)),
        flops=flops,
    ),
)
