"""The blocks of MoCE-IR. That of its encoder is Restormer's, whose norms are in a list, and whose attention is its
`mixer`. That of its decoder has a first half of its own: an attention, an adapter of experts, and a cross-attention of
the second to the first.
"""

from __future__ import annotations

from torch import nn

from mirage.fast import modules as fast
from mirage.fast.recognise.pattern import Held, Pattern
from mirage.fast.recognise.restormer_block import ATTENTION, FEED_FORWARD, attention_stage, feed_forward_stage

ATTENTION_STAGE = attention_stage(lambda norm: {"norms": Pattern(children={"0": norm}), "mixer": ATTENTION})
FEED_FORWARD_STAGE = feed_forward_stage(lambda norm: {"norms": Pattern(children={"1": norm}), "ffn": FEED_FORWARD})
STAGES = (ATTENTION_STAGE, FEED_FORWARD_STAGE)
NORMS = Pattern(children={number: Pattern(children={"body": Pattern()}) for number in ("0", "1")}, only=True)
BLOCK = Pattern(children={"norms": NORMS, "mixer": ATTENTION, "ffn": FEED_FORWARD})
"""The encoder's, its structure; its class is in `mirage.fast.block`, which asks the stages."""

CROSS_ATTENTION = Pattern(
    fast.CrossChannelAttention,
    fast=True,
    tensors={"temperature": Held("temperature", ("heads", 1, 1))},
    children={
        name: Pattern(nn.Conv2d, sizes={"in_channels": inputs, "out_channels": outputs})
        for name, inputs, outputs in (
            ("q", "dim", "dim"),
            ("q_dwconv", "dim", "dim"),
            ("kv", "dim", (2, "dim")),
            ("kv_dwconv", (2, "dim"), (2, "dim")),
            ("project_out", "dim", "dim"),
        )
    },
)
"""AdaIR's too. Its convolutions are called, of whatever size they are."""
DECODER_BLOCK = Pattern(
    children={
        "norms": NORMS,
        "proj": Pattern(children={"0": Pattern(), "1": Pattern()}, only=True),
        "shared": ATTENTION,
        "adapter": Pattern(),
        "mixer": CROSS_ATTENTION,
        "ffn": FEED_FORWARD,
    }
)
FOURIER_ATTENTION = Pattern(
    children={
        **{name: Pattern(nn.Conv2d) for name in ("q", "q_dwconv", "kv", "kv_dwconv", "proj_out")},
        "norm": Pattern(),
    }
)
EXPERT = Pattern(
    children={
        "proj": Pattern(children={number: Pattern(nn.Conv2d) for number in ("0", "1", "2")}, only=True),
        "body": Pattern(),
    }
)
EXPERT_SEQUENCE = Pattern(nn.Sequential, children={"0": EXPERT}, only=True)
ADAPTER = Pattern(
    children={"routing": Pattern(children={"freq_gate": Pattern()}), "experts": Pattern(), "proj_out": Pattern()}
)
"""All of these are called."""
