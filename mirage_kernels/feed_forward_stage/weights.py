"""The weights of ``feed_forward_stage``: names, order and shapes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeedForwardWeights(NamedTuple):
    """Parameters of the second half of a block with C channels, in the shapes that `mirage.blocks` holds them; M is
    the number of pairs of hidden channels."""

    norm_weight: Tensor  # [C], of norm2
    norm_bias: Tensor  # [C]
    project_in: Tensor  # [2M, C, 1, 1]
    dwconv: Tensor  # [2M, 1, 3, 3]
    project_out: Tensor  # [C, M, 1, 1]


def shapes(channels: int, pairs: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, for `channels` of x and `pairs` of hidden channels."""
    return {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "project_in": (2 * pairs, channels, 1, 1),
        "dwconv": (2 * pairs, 1, 3, 3),
        "project_out": (channels, pairs, 1, 1),
    }
