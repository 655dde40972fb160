"""What is true of ``feed_forward_stages``, of both halves of a block of NAFNet, twice. A shape is [B, C, H, W]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape, at_levels, randn
from mirage_kernels.feed_forward_stage import cases as stage
from mirage_kernels.feed_forward_stages.weights import ScaledFeedForward

COUNT = 2
FORM = {"norm": "centred", "activation": "none", "gate": "none"}
FIRST, SECOND = stage.EXCITED.arguments[1:], stage.POINTWISE.arguments[1:]


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    """x, and the weights and the scale of each half."""
    x, *first = stage.make(shape, generator, 1, FIRST)
    _, *second = stage.make(shape, generator, 2, SECOND)
    scales = [randn(1, shape[1], 1, 1, generator=generator) for _ in range(2)]
    return x, *first, scales[0], *second, scales[1]


def halves(tensors: tuple[Any, ...]) -> list[ScaledFeedForward]:
    """The stages of one block, of tensors in the order of `make`."""
    (*first, scale), (*second, other) = tensors[: len(FIRST) + 1], tensors[len(FIRST) + 1 :]
    return [
        ScaledFeedForward(stage.of_names(FIRST, tuple(first)), 1e-6, scale),
        ScaledFeedForward(stage.of_names(SECOND, tuple(second)), 1e-6, other),
    ]


def call(function: Callable[..., Tensor], x: Tensor, *tensors: Tensor) -> Tensor:
    return function(x, halves(tensors) * COUNT, **FORM)


def flops(x: Shape, *tensors: Any) -> int:
    return COUNT * sum(stage.flops(x, *half.weights) for half in halves(tensors))


CASES = (
    Operator(
        name="feed_forward_stages",
        arguments=(
            "x",
            *(f"first_{name}" for name in FIRST),
            "first_scale",
            *(f"second_{name}" for name in SECOND),
            "second_scale",
        ),
        make=make,
        shapes=stage.MIRAGE.shapes,
        empty=stage.MIRAGE.empty,
        large=stage.MIRAGE.large,
        in_network=at_levels(stage.shape_at),
        flops=flops,
        call=call,
        is_stage=True,
        gradients=False,
    ),
)
