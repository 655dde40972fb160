"""Drop-in acceleration: the same network, the same parameters and numbers, on the kernels of `mirage_kernels`.

    model = mirage.from_checkpoint("mirage.ckpt")
    mirage.fast.accelerate(model)

`accelerate` swaps the modules of a model instance in place, `revert` undoes it, `summary` tells what was replaced.
`warmup` compiles what images of some shapes need before the first comes; `cuda_graph` replays an inference pass on a
GPU with one launch.
The modules also stand alone, with the constructors and parameter names of `mirage.blocks` and
`mirage.networks.restormer`.
"""

from typing import Any, cast

import mirage
from mirage.fast.block import BlockSequence, DecoderBlock, EncoderBlock, NAFBlock, RestormerBlock, TransformerBlock
from mirage.fast.cuda_graph import GraphedModel, cuda_graph
from mirage.fast.experts import Expert, ExpertAdapter, ExpertSequence, FourierAttention
from mirage.fast.frequencies import FrequencyModule
from mirage.fast.modules import (
    Attention,
    BiasFreeLayerNorm,
    ChannelAttention,
    Conv2d,
    CrossChannelAttention,
    FeedForward,
    GatedCNNBlock,
    GatedFeedForward,
    LayerNorm,
    PixelShuffle,
    PixelUnshuffle,
    SPDCovariance,
)
from mirage.fast.networks import MIRAGE, NAFNet, PromptIR, Restormer
from mirage.fast.swap import Summary, accelerate, revert, summary
from mirage.fast.warmup import warmup

__all__ = [
    "MIRAGE",
    "Attention",
    "BiasFreeLayerNorm",
    "BlockSequence",
    "ChannelAttention",
    "Conv2d",
    "CrossChannelAttention",
    "DecoderBlock",
    "EncoderBlock",
    "Expert",
    "ExpertAdapter",
    "ExpertSequence",
    "FeedForward",
    "FourierAttention",
    "FrequencyModule",
    "GatedCNNBlock",
    "GatedFeedForward",
    "GraphedModel",
    "LayerNorm",
    "NAFBlock",
    "NAFNet",
    "PixelShuffle",
    "PixelUnshuffle",
    "PromptIR",
    "Restormer",
    "RestormerBlock",
    "SPDCovariance",
    "Summary",
    "TransformerBlock",
    "accelerate",
    "cuda_graph",
    "mirage_small",
    "mirage_tiny",
    "revert",
    "summary",
    "warmup",
]


def mirage_tiny(*, memory: str = "low", **overrides: Any) -> MIRAGE:
    """`mirage.mirage_tiny` with fast modules; the same parameters, names and results. `memory`: see `accelerate`."""
    return cast(MIRAGE, accelerate(mirage.mirage_tiny(**overrides), memory))


def mirage_small(*, memory: str = "low", **overrides: Any) -> MIRAGE:
    """`mirage.mirage_small` with fast modules; the same parameters, names and results. `memory`: see `accelerate`."""
    return cast(MIRAGE, accelerate(mirage.mirage_small(**overrides), memory))
