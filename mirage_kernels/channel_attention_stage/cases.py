"""What is true of ``channel_attention_stage``. A shape is [B, C, H, W, heads]. Its modes are the norms and biases of
published networks: LayerNorm, LayerNorm with biases of all convolutions, and a bias-free norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Generator, Tensor

from mirage_kernels._runtime.cases import Level, Operator, Shape, at_levels, pixels, randn
from mirage_kernels.channel_attention_stage.weights import DESCRIPTION, ChannelAttentionWeights

DECLINED = {"cuda": "channel_attention_stage has no kernel in CUDA C++: on GPUs it is a chain of Triton's operators"}
BIASES = ("qkv_bias", "qkv_dwconv_bias", "project_out_bias")


def make(shape: Shape, generator: Generator, without: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    """x and the weights that are there."""
    *of_x, heads = shape
    x = randn(*of_x, generator=generator) * 2 + 0.5
    return x, *DESCRIPTION.ordinary(generator, without, C=of_x[1], heads=heads).values()


def _given(without: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in ChannelAttentionWeights._fields if name not in without)


def weights_of(given: tuple[Any, ...], without: tuple[str, ...] = ()) -> ChannelAttentionWeights:
    """All weights, None for those that are left out."""
    named = dict(zip(_given(without), given, strict=True))
    return ChannelAttentionWeights(*(named.get(name) for name in ChannelAttentionWeights._fields))


def call(
    function: Callable[..., Tensor],
    x: Tensor,
    *given: Tensor,
    without: tuple[str, ...] = (),
    norm: str = "centred",
) -> Tensor:
    return function(x, weights_of(given, without), norm)


def shape_at(level: Level) -> Shape:
    return 1, level.channels, level.height, level.width, level.heads


def flops(x: Shape, weights: ChannelAttentionWeights) -> int:
    """`weights`: their shapes."""
    _, channels, *_ = x
    of_pixel = DESCRIPTION.multiply_adds(weights, "pixel") + 2 * channels * (channels // weights.temperature[0])
    return 2 * pixels(x) * of_pixel


def _case(mode: str, without: tuple[str, ...], norm: str = "centred") -> Operator:
    return Operator(
        name="channel_attention_stage",
        mode=mode,
        arguments=("x", *_given(without)),
        make=partial(make, without=without),
        shapes=((2, 12, 5, 7, 2), (1, 9, 1, 1, 3), (1, 6, 1, 13, 1), (2, 6, 11, 1, 2), (1, 16, 9, 10, 1)),
        empty=(0, 12, 5, 7, 2),
        large=(1, 6, 512, 1024, 1),
        in_network=at_levels(shape_at),
        flops=lambda x, *given: flops(x, weights_of(given, without)),
        call=partial(call, without=without, norm=norm),
        declined=DECLINED,
        is_stage=True,
        is_chain_on_gpus=True,
    )


CASES = (
    _case("", BIASES),
    _case("biases", ()),
    _case("uncentred", ("norm_bias", *BIASES), "uncentred"),
)
CENTRED, WITH_BIASES, UNCENTRED = CASES
