"""The block of MoCE-IR's encoder: that of Restormer, whose norms are in a list, and whose attention is its `mixer`."""

from __future__ import annotations

import mirage_kernels
from mirage.fast.recognise.pattern import Pattern
from mirage.fast.recognise.restormer_block import ATTENTION, FEED_FORWARD, NORMS
from mirage.fast.recognise.stage import FirstOf, Stage

ATTENTION_STAGE = FirstOf(
    *(
        Stage(
            "channel_attention_stage",
            {"norms": Pattern(children={"0": pattern}), "mixer": ATTENTION},
            weights=mirage_kernels.ChannelAttentionWeights._fields,
            numbers=("norm_eps",),
            fixed=(norm,),
        )
        for norm, pattern in NORMS.items()
    )
)
FEED_FORWARD_STAGE = FirstOf(
    *(
        Stage(
            "feed_forward_stage",
            {"norms": Pattern(children={"1": pattern}), "ffn": FEED_FORWARD},
            weights=mirage_kernels.FeedForwardWeights._fields,
            numbers=("norm_eps",),
            fixed=(norm, "none"),
        )
        for norm, pattern in NORMS.items()
    )
)
STAGES = (ATTENTION_STAGE, FEED_FORWARD_STAGE)
BLOCK = Pattern(
    children={
        "norms": Pattern(children={number: Pattern(children={"body": Pattern()}) for number in ("0", "1")}, only=True),
        "mixer": ATTENTION,
        "ffn": FEED_FORWARD,
    }
)
"""Its structure; its class is in `mirage.fast.block`, which asks the stages."""
