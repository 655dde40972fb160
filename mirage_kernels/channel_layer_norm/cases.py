"""What is true of ``channel_layer_norm``. A shape is [B, C, H, W]."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, at_levels, randn


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    x = randn(*shape, generator=generator) * 2 + 0.5
    weight, bias = (randn(shape[1], generator=generator) for _ in range(2))
    return x, weight + 1, bias


def flops(*shapes: Any) -> int:
    """It has no products."""
    return 0


CASES = (
    Operator(
        name="channel_layer_norm",
        arguments=("x", "weight", "bias"),
        make=make,
        shapes=(
            (2, 6, 5, 7),
            (1, 5, 1, 1),
            (1, 3, 1, 13),
            (2, 24, 11, 1),
            (1, 30, 16, 17),
            (3, 97, 3, 3),
            (1, 24, 33, 47),
        ),
        empty=(0, 6, 5, 7),
        large=(1, 6, 1024, 1024),
        in_network=at_levels(lambda level: (1, level.channels, level.height, level.width)),
        flops=flops,
    ),
)
