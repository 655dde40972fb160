"""The weights of ``channel_attention_stage``: names, order and shapes."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from mirage_kernels._runtime.weights import Description, Weight, sizes

C, heads = sizes("C heads")


class ChannelAttentionWeights(NamedTuple):
    """Parameters of the first half of a block with C channels, in the shapes that `mirage.networks.restormer` holds
    them. Those that may be None are absent from many networks."""

    norm_weight: Annotated[Tensor, Weight(C, around=1)]  # of norm1
    norm_bias: Annotated[Tensor | None, Weight(C, optional=True, around=0.3)]
    qkv: Annotated[Tensor, Weight(3 * C, C, 1, 1, per="pixel")]
    qkv_bias: Annotated[Tensor | None, Weight(3 * C, optional=True, around=0.1)]
    qkv_dwconv: Annotated[Tensor, Weight(3 * C, 1, 3, 3, per="pixel")]
    qkv_dwconv_bias: Annotated[Tensor | None, Weight(3 * C, optional=True, around=0.1)]
    temperature: Annotated[Tensor, Weight(heads, 1, 1, around=2)]
    project_out: Annotated[Tensor, Weight(C, C, 1, 1, per="pixel")]
    project_out_bias: Annotated[Tensor | None, Weight(C, optional=True, around=0.1)]


DESCRIPTION = Description(ChannelAttentionWeights)


def shapes(channels: int, num_heads: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, for `channels` of x."""
    return DESCRIPTION.shapes(C=channels, heads=num_heads)


def kept_shape(batch: int, channels: int, num_heads: int) -> tuple[int, ...]:
    """The shape of what forward keeps for backward beside x, in the dtype of the accumulator: per sample and head of d
    channels the softmax, q k^T, |q| and |k|, as `mirage_kernels.channel_attention` keeps them."""
    depth = channels // num_heads
    return batch, num_heads, 2 * depth + 2, depth
