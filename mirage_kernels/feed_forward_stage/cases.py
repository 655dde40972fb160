"""What is true of ``feed_forward_stage``. A shape is [B, C, H, W]; there are 2 C pairs of hidden channels."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import LARGER, Level, Operator, Shape, at_levels, pixels, randn
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights


def make(shape: Shape, generator: Generator, ratio: int = 2) -> tuple[Tensor, ...]:
    """`ratio`: pairs of hidden channels for each channel."""
    channels = shape[1]
    hidden = ratio * channels
    return (
        randn(*shape, generator=generator) * 2 + 0.5,
        1 + 0.1 * randn(channels, generator=generator),
        0.3 * randn(channels, generator=generator),
        randn(2 * hidden, channels, 1, 1, generator=generator) / channels**0.5,
        randn(2 * hidden, 1, 3, 3, generator=generator) / 3,
        randn(channels, hidden, 1, 1, generator=generator) / hidden**0.5,
    )


def shape_at(level: Level) -> Shape:
    return 1, level.channels, level.height, level.width


def flops(x: Shape, norm_weight: Shape, norm_bias: Shape, project_in: Shape, *_: Any) -> int:
    channels, doubled = x[1], project_in[0]
    return 2 * pixels(x) * (doubled * channels + 9 * doubled + channels * doubled // 2)


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
