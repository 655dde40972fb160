"""The block of Restormer and of the networks that descend from it: x + attn(norm1(x)), then x + ffn(norm2(x)), as
`mirage.networks.restormer.RestormerBlock`. Convolutions may have biases, and norms are of two kinds.
"""

from __future__ import annotations

from collections.abc import Callable

import mirage_kernels
from mirage import blocks
from mirage.fast import modules as fast
from mirage.fast.recognise.mirage_block import NORM
from mirage.fast.recognise.parts import convolution, depthwise
from mirage.fast.recognise.pattern import Held, Pattern, Setting
from mirage.fast.recognise.stage import FirstOf, Stage

BIAS_FREE_NORM = Pattern(
    fast.BiasFreeLayerNorm,
    fast=True,
    children={
        "body": Pattern(
            tensors={"weight": Held("norm_weight", ("dim",)), "bias": Held("norm_bias", optional=True)},
            absent=("bias",),
            takes={"eps": Setting("norm_eps", blocks.NORM_EPS)},
        )
    },
)
"""It divides by the deviation and does not subtract the mean."""
NORMS = {"centred": NORM, "uncentred": BIAS_FREE_NORM}
"""By their names in `mirage_kernels`."""

ATTENTION = Pattern(
    fast.ChannelAttention,
    fast=True,
    tensors={"temperature": Held("temperature", ("heads", 1, 1))},
    children={
        "qkv": convolution("qkv", "dim", (3, "dim"), bias="qkv_bias"),
        "qkv_dwconv": depthwise("qkv_dwconv", (3, "dim"), bias="qkv_dwconv_bias"),
        "project_out": convolution("project_out", "dim", "dim", bias="project_out_bias"),
    },
)
FEED_FORWARD = Pattern(
    fast.GatedFeedForward,
    fast=True,
    children={
        "project_in": convolution("project_in", "dim", (2, "hidden"), bias="project_in_bias"),
        "dwconv": depthwise("dwconv", (2, "hidden"), bias="dwconv_bias"),
        "project_out": convolution("project_out", "hidden", "dim", bias="project_out_bias"),
    },
)


def attention_stage(children: Callable[[Pattern], dict[str, Pattern]]) -> FirstOf:
    """The first half of a block. `children`: those of the block that it runs, for the pattern of their norm."""
    return FirstOf(
        *(
            Stage(
                "channel_attention_stage",
                children(pattern),
                weights=mirage_kernels.ChannelAttentionWeights._fields,
                numbers=("norm_eps",),
                fixed=(norm,),
            )
            for norm, pattern in NORMS.items()
        )
    )


def feed_forward_stage(children: Callable[[Pattern], dict[str, Pattern]]) -> FirstOf:
    """The second half. See `attention_stage`."""
    return FirstOf(
        *(
            Stage(
                "feed_forward_stage",
                children(pattern),
                weights=mirage_kernels.FeedForwardWeights._fields[:8],  # no excitation
                numbers=("norm_eps",),
                fixed=(norm, "none"),
            )
            for norm, pattern in NORMS.items()
        )
    )


ATTENTION_STAGE = attention_stage(lambda norm: {"norm1": norm, "attn": ATTENTION})
FEED_FORWARD_STAGE = feed_forward_stage(lambda norm: {"norm2": norm, "ffn": FEED_FORWARD})
STAGES = (ATTENTION_STAGE, FEED_FORWARD_STAGE)
BLOCK = Pattern(
    children={
        "norm1": Pattern(children={"body": Pattern()}),
        "attn": ATTENTION,
        "norm2": Pattern(children={"body": Pattern()}),
        "ffn": FEED_FORWARD,
    }
)
"""Its structure; its class is in `mirage.fast.block`, which asks the stages."""
