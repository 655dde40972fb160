"""AdaIR's module of frequencies. Its children are called; its three cross-attentions are MoCE-IR's."""

from __future__ import annotations

from mirage.fast.recognise.pattern import Held, Pattern

CALLED = ("conv1", "rate_conv", "channel_cross_l", "channel_cross_h", "channel_cross_agg", "frequency_refine")
MODULE = Pattern(
    tensors={name: Held(name, ("dim", 1, 1)) for name in ("para1", "para2")},
    children={name: Pattern() for name in CALLED},
)
