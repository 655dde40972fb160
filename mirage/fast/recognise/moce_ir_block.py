"""The block of MoCE-IR's encoder: that of Restormer, whose norms are in a list, and whose attention is its `mixer`."""

from __future__ import annotations

from mirage.fast.recognise.pattern import Pattern
from mirage.fast.recognise.restormer_block import ATTENTION, FEED_FORWARD, attention_stage, feed_forward_stage

ATTENTION_STAGE = attention_stage(lambda norm: {"norms": Pattern(children={"0": norm}), "mixer": ATTENTION})
FEED_FORWARD_STAGE = feed_forward_stage(lambda norm: {"norms": Pattern(children={"1": norm}), "ffn": FEED_FORWARD})
STAGES = (ATTENTION_STAGE, FEED_FORWARD_STAGE)
BLOCK = Pattern(
    children={
        "norms": Pattern(children={number: Pattern(children={"body": Pattern()}) for number in ("0", "1")}, only=True),
        "mixer": ATTENTION,
        "ffn": FEED_FORWARD,
    }
)
"""Its structure; its class is in `mirage.fast.block`, which asks the stages."""
