"""What is true of ``mixer_stage``, in eval mode and in training. A shape is [B, C, H, W, heads]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from mirage_kernels._runtime.cases import LARGER, Level, Operator, Shape, at_levels, pixels, randn
from mirage_kernels.mixer_stage.weights import DESCRIPTION, LEARNED, TAPS, MixerWeights


def make(shape: Shape, generator: Generator) -> tuple[Tensor, ...]:
    """x and the weights that have gradients."""
    *of_x, heads = shape
    x = randn(*of_x, generator=generator) * 2 + 0.5
    channels, branch = of_x[1], of_x[1] // 3
    weights = DESCRIPTION.ordinary(generator, C=channels, c=branch, h=int(8 / 3 * branch), heads=heads)
    return x, *weights.values()


def with_statistics(learned: Sequence[Tensor]) -> MixerWeights:
    """All weights from those that have gradients; the running statistics are a function of the shape."""
    branch = learned[0].shape[0] // 3
    mean, var = (torch.linspace(*ends, branch).to(learned[0]) for ends in ((-0.3, 0.4), (0.5, 2.0)))
    return MixerWeights(**dict(zip(LEARNED, learned, strict=True)), bn_mean=mean.detach(), bn_var=var.detach())


def call(
    function: Callable[..., Any], x: Tensor, *learned: Tensor, training: bool = False, drop: bool = False
) -> Tensor:
    """`drop`: stochastic depth leaves every second sample's gated branch out."""
    scale = torch.tensor([1.25, 0.0])[torch.arange(x.shape[0]) % 2].to(x) if drop else None
    return function(x, with_statistics(learned), scale, training).y


def shape_at(level: Level) -> Shape:
    return 1, level.channels, level.height, level.width, level.heads


def flops(x: Shape, weights: MixerWeights) -> int:
    """Matrices and depthwise convolutions on every pixel, the generator of kernels on every sample. `weights`: their
    shapes."""
    branch, heads = x[1] // 3, weights.temperature[0]
    of_pixel = DESCRIPTION.multiply_adds(weights, "pixel") + TAPS * branch + 2 * branch * (branch // heads)
    return 2 * (pixels(x) * of_pixel + x[0] * DESCRIPTION.multiply_adds(weights, "sample"))


def _flops_of_learned(x: Shape, *learned: Shape) -> int:
    named = dict(zip(LEARNED, learned, strict=True))
    return flops(x, MixerWeights(**named, bn_mean=named["bn_weight"], bn_var=named["bn_weight"]))


EVAL = Operator(
    name="mixer_stage",
    arguments=("x", *LEARNED),
    make=make,
    shapes=((2, 12, 5, 7, 2), (1, 9, 1, 1, 3), (1, 6, 1, 13, 1), (2, 6, 11, 1, 2), (1, 12, 9, 10, 1)),
    empty=(0, 12, 5, 7, 2),
    large=(1, 6, 512, 1024, 1),
    in_network=at_levels(shape_at),
    flops=_flops_of_learned,
    call=call,
    compiled=tuple(map(shape_at, LARGER)),
    is_stage=True,
)
TRAINING = replace(
    EVAL,
    mode="training",
    shapes=tuple((3, *shape[1:]) if shape[:4] == (1, 9, 1, 1) else shape for shape in EVAL.shapes),
    call=partial(call, training=True, drop=True),
    compiled=((2, 48, 112, 112, 2),),
)
CASES = (EVAL, TRAINING)
