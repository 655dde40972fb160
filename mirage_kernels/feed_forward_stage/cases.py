"""What is true of ``feed_forward_stage``. A shape is [B, C, H, W]; there are 2 C pairs of hidden channels."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import LARGER, Level, Operator, Shape, at_levels, pixels, randn
from mirage_kernels.feed_forward_stage.weights import DESCRIPTION, FeedForwardWeights


def make(shape: Shape, generator: Generator, ratio: int = 2) -> tuple[Tensor, ...]:
    """`ratio`: pairs of hidden channels for each channel."""
    x = randn(*shape, generator=generator) * 2 + 0.5
    return x, *DESCRIPTION.ordinary(generator, C=shape[1], M=ratio * shape[1]).values()


def shape_at(level: Level) -> Shape:
    return 1, level.channels, level.height, level.width


def flops(x: Shape, *arguments: Any) -> int:
    weights = arguments[: len(FeedForwardWeights._fields)]
    return 2 * pixels(x) * DESCRIPTION.multiply_adds(weights, "pixel")


CASES = (
    Operator(
        name="feed_forward_stage",
        arguments=("x", *FeedForwardWeights._fields),
        make=make,
        shapes=((2, 6, 5, 7), (1, 3, 1, 1), (1, 5, 1, 17), (2, 4, 17, 1), (1, 6, 13, 16)),
        empty=(0, 6, 5, 7),
        large=(1, 2, 1024, 1024),
        in_network=at_levels(shape_at),
        flops=flops,
        compiled=tuple(map(shape_at, LARGER)),
        is_stage=True,
    ),
)
