"""What is true of ``tri_branch_fusion``. A shape is [B, C, H, W]."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, at_levels, randn


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    maps = [randn(*shape, generator=generator) for _ in range(3)]
    return *maps, *(1 + 0.1 * randn(1, generator=generator) for _ in range(3))


def flops(*shapes: Any) -> int:
    """It has no products."""
    return 0


CASES = (
    Operator(
        name="tri_branch_fusion",
        arguments=("att", "conv", "mlp", "l_att", "l_conv", "l_mlp"),
        make=make,
        shapes=((2, 8, 5, 7), (1, 5, 1, 1), (1, 3, 1, 13), (2, 24, 11, 1), (1, 7, 33, 47)),
        empty=(0, 8, 5, 7),
        large=(1, 4, 1024, 1024),
        in_network=at_levels(lambda level: (1, level.channels // 3, level.height, level.width)),
        flops=flops,
    ),
)
