"""What is true of ``transformer_blocks``, of two blocks with the same weights. A shape is [B, C, H, W, heads]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Operator, Shape
from mirage_kernels.feed_forward_stage import cases as feed_forward
from mirage_kernels.feed_forward_stage.weights import OF_MIRAGE, FeedForwardWeights
from mirage_kernels.mixer_stage import cases as mixer
from mirage_kernels.mixer_stage.weights import LEARNED
from mirage_kernels.transformer_blocks.weights import BlockWeights

COUNT = 2


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    """x and the weights of a block that have gradients."""
    return *mixer.make(shape, generator), *feed_forward.make(shape[:4], generator)[1:]


def call(function: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
    learned, rest = weights[: len(LEARNED)], weights[len(LEARNED) :]
    return function(x, [BlockWeights(mixer.with_statistics(learned), FeedForwardWeights(*rest))] * COUNT)


def flops(x: Shape, *weights: Any) -> int:
    learned, rest = weights[: len(LEARNED)], weights[len(LEARNED) :]
    return COUNT * (mixer.EVAL.flops(x, *learned) + feed_forward.flops(x, *rest))


CASES = (
    Operator(
        name="transformer_blocks",
        arguments=("x", *LEARNED, *(f"feed_forward_{name}" for name in OF_MIRAGE)),
        make=make,
        shapes=mixer.EVAL.shapes,
        empty=mixer.EVAL.empty,
        large=mixer.EVAL.large,
        in_network=mixer.EVAL.in_network,
        flops=flops,
        call=call,
        is_stage=True,
        gradients=False,
    ),
)
