"""What ``transformer_blocks`` takes of a block."""

from __future__ import annotations

from typing import NamedTuple

from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights
from mirage_kernels.mixer_stage.weights import MixerWeights


class BlockWeights(NamedTuple):
    """The weights of a block's halves, and what is added to the variances of its norms."""

    mixer: MixerWeights
    feed_forward: FeedForwardWeights
    norm1_eps: float = 1e-5
    bn_eps: float = 1e-5
    norm2_eps: float = 1e-5
