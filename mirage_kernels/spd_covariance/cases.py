"""What is true of ``spd_covariance``. A shape is [B, C, H, W]."""

from __future__ import annotations

import math
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, randn


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    return (randn(*shape, generator=generator) * 2 + 0.5,)


def in_network(dim: int, size: int) -> list[Shape]:
    """Of the SPD head: 12 channels of the first level's size, 24 of the latent's."""
    return [(1, 12, size, size), (1, 24, size // 8, size // 8)]


def flops(x: Shape, *_: Any) -> int:
    """The product of C x N and N x C."""
    return 2 * math.prod(x) * x[1]


CASES = (
    Operator(
        name="spd_covariance",
        arguments=("x",),
        make=make,
        shapes=(
            (2, 6, 5, 7),
            (1, 5, 1, 2),
            (1, 1, 2, 1),
            (2, 12, 1, 13),
            (1, 3, 4, 5),
            (3, 24, 16, 16),
            (1, 37, 11, 3),
            (9, 3, 25, 31),
            (1, 12, 47, 61),
        ),
        empty=(0, 6, 5, 7),
        large=(1, 12, 1024, 1024),
        in_network=in_network,
        flops=flops,
        compiled=((1, 12, 224, 224), (1, 128, 28, 28)),  # the latter: as many channels as fit
    ),
)
