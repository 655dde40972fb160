"""What is true of ``feed_forward_stage``. A shape is [B, C, H, W]; there are 2 C pairs of hidden channels in MIRAGE's,
int(2.66 C) in others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import LARGER, Level, Operator, Shape, at_levels, pixels, randn
from mirage_kernels.feed_forward_stage.weights import (
    CONVOLUTION_BIASES,
    COUNT,
    DESCRIPTION,
    EXCITATION,
    OF_MIRAGE,
    FeedForwardWeights,
)


def make(
    shape: Shape, generator: Generator, ratio: float = 2, names: tuple[str, ...] = OF_MIRAGE
) -> tuple[Tensor, ...]:
    """`ratio`: pairs of hidden channels for each channel. `names`: of the weights that there are."""
    x = randn(*shape, generator=generator) * 2 + 0.5
    without = set(FeedForwardWeights._fields) - set(names)
    values = DESCRIPTION.ordinary(generator, without, C=shape[1], M=int(ratio * shape[1]))
    return x, *values.values()


def shape_at(level: Level) -> Shape:
    return 1, level.channels, level.height, level.width


def flops(x: Shape, *arguments: Any) -> int:
    """Of x and weights in their order, of which the last may be missing."""
    weights = [*arguments[:COUNT], *(None,) * (COUNT - len(arguments))]
    of_pixel, of_sample = (DESCRIPTION.multiply_adds(weights, per) for per in ("pixel", "sample"))
    return 2 * pixels(x) * of_pixel + 2 * x[0] * of_sample


def of_names(names: tuple[str, ...], tensors: tuple[Any, ...]) -> FeedForwardWeights:
    """The weights of these names, and None in the place of others."""
    absent = dict.fromkeys(FeedForwardWeights._fields)
    return FeedForwardWeights(**{**absent, **dict(zip(names, tensors, strict=True))})


def _call(function: Callable[..., Tensor], x: Tensor, *tensors: Tensor, names: tuple[str, ...], **form: str) -> Tensor:
    return function(x, *of_names(names, tensors), **form)


def _flops(x: Shape, *shapes: Any, names: tuple[str, ...]) -> int:
    return flops(x, *of_names(names, shapes))


MIRAGE = Operator(
    name="feed_forward_stage",
    arguments=("x", *OF_MIRAGE),
    make=make,
    shapes=((2, 6, 5, 7), (1, 3, 1, 1), (1, 5, 1, 17), (2, 4, 17, 1), (1, 6, 13, 16)),
    empty=(0, 6, 5, 7),
    large=(1, 2, 1024, 1024),
    in_network=at_levels(shape_at),
    flops=flops,
    compiled=tuple(map(shape_at, LARGER)),
    is_stage=True,
)


def _other(mode: str, names: tuple[str, ...], **form: str) -> Operator:
    reason = "its kernels have MIRAGE's stage"
    return replace(
        MIRAGE,
        mode=mode,
        arguments=("x", *names),
        make=partial(make, ratio=2.66, names=names),
        flops=partial(_flops, names=names),
        call=partial(_call, names=names, **form),
        compiled=(),
        declined={"triton": reason, "cuda": reason},
    )


BIAS_FREE = _other(
    "bias-free",
    tuple(name for name in OF_MIRAGE if name != "norm_bias"),
    norm="uncentred",
    activation="none",
)
"""As in Restormer's published denoisers."""
BIASED = _other("biased", OF_MIRAGE + CONVOLUTION_BIASES, norm="centred", activation="none")
_WITHOUT_GELU = {"norm": "centred", "activation": "none", "gate": "none"}
EXCITED = _other("excited", OF_MIRAGE + CONVOLUTION_BIASES + EXCITATION, **_WITHOUT_GELU)
"""The first half of NAFNet's blocks."""
POINTWISE = _other(
    "pointwise",
    tuple(name for name in OF_MIRAGE + CONVOLUTION_BIASES if not name.startswith("dwconv")),
    **_WITHOUT_GELU,
)
"""Their second half."""
CASES = (MIRAGE, BIAS_FREE, BIASED, EXCITED, POINTWISE)
