"""What is true of ``dynamic_depthwise_conv2d``. A shape is [B, C, H, W, K]."""

from __future__ import annotations

import math
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, at_levels, randn


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    *planes, kernel = shape
    x = randn(*planes, generator=generator)
    return x, randn(*planes[:2], kernel, kernel, generator=generator) / kernel


def flops(x: Shape, weight: Shape, *_: Any) -> int:
    return 2 * math.prod(x) * math.prod(weight[2:])


CASES = (
    Operator(
        name="dynamic_depthwise_conv2d",
        arguments=("x", "weight"),
        make=make,
        shapes=(
            (2, 2, 6, 9, 3),
            (1, 3, 6, 9, 7),
            (1, 2, 1, 1, 7),
            (1, 1, 1, 37, 7),
            (1, 1, 35, 1, 7),
            (1, 1, 2, 3, 9),
            (1, 1, 11, 18, 9),
            (1, 1, 13, 17, 11),
            (1, 1, 37, 35, 5),
        ),
        empty=(0, 3, 6, 9, 7),
        large=(1, 1, 1024, 1031, 7),
        in_network=at_levels(lambda level: (1, level.channels // 3, level.height, level.width, 7)),
        flops=flops,
        # every kernel size, and heights that groups of four rows divide and not
        compiled=(
            *((2, 8, 224, 224, kernel) for kernel in (3, 5, 9, 11)),
            *((2, 8, side, side, kernel) for kernel in (3, 7) for side in (16, 27)),
            (2, 8, 13, 13, 11),
        ),
    ),
)
