"""The weights of ``feed_forward_stage``: names, order and shapes."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from mirage_kernels._runtime.weights import Description, Weight, sizes

C, M = sizes("C M")


class FeedForwardWeights(NamedTuple):
    """Parameters of the second half of a block with C channels, in the shapes that `mirage.blocks` holds them; M is
    the number of pairs of hidden channels."""

    norm_weight: Annotated[Tensor, Weight(C, around=1)]  # of norm2
    norm_bias: Annotated[Tensor, Weight(C)]
    project_in: Annotated[Tensor, Weight(2 * M, C, 1, 1, per="pixel")]
    dwconv: Annotated[Tensor, Weight(2 * M, 1, 3, 3, per="pixel")]
    project_out: Annotated[Tensor, Weight(C, M, 1, 1, per="pixel")]


DESCRIPTION = Description(FeedForwardWeights)


def shapes(channels: int, pairs: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, for `channels` of x and `pairs` of hidden channels."""
    return DESCRIPTION.shapes(C=channels, M=pairs)
