"""What the implementations of ``mixer_stage`` exchange: weights and statistics, with names, order and shapes."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from mirage_kernels._runtime.library import accumulator
from mirage_kernels._runtime.weights import Description, Weight, sizes

TAPS = 49
"""The elements of a generated kernel, 7x7."""

C, c, h, heads = sizes("C c h heads")


class MixerWeights(NamedTuple):
    """Parameters and running statistics of the first half of a block with C = 3c channels, in the shapes that
    `mirage.blocks` holds them; h is the number of gated channels (``int(8 / 3 * c)`` in MIRAGE)."""

    norm_weight: Annotated[Tensor, Weight(C, around=1)]  # of norm1
    norm_bias: Annotated[Tensor, Weight(C, around=0.3)]
    qkv: Annotated[Tensor, Weight(3 * c, c, 1, 1, per="pixel")]
    qkv_dwconv: Annotated[Tensor, Weight(3 * c, 1, 3, 3, per="pixel")]
    temperature: Annotated[Tensor, Weight(heads, 1, 1, around=2)]
    bn_weight: Annotated[Tensor, Weight(c, around=1)]  # of the gated CNN's batch norm
    bn_bias: Annotated[Tensor, Weight(c, around=0.3)]
    bn_mean: Annotated[Tensor, Weight(c, learned=False)]  # running, and not read in training
    bn_var: Annotated[Tensor, Weight(c, learned=False)]
    gic1: Annotated[Tensor, Weight(2 * h, c, 1, 1, per="pixel")]  # rows of gate (h), identity (h - c) and detail (c)
    generator_in: Annotated[Tensor, Weight(c, c, 1, 1, per="sample")]
    generator_out: Annotated[Tensor, Weight(TAPS * c, c, 1, 1, per="sample")]
    gate_temperature: Annotated[Tensor, Weight(1, around=1)]
    gic2: Annotated[Tensor, Weight(c, h, 1, 1, per="pixel")]
    proj_out: Annotated[Tensor, Weight(c, c, 1, 1, per="pixel")]
    mlp_in: Annotated[Tensor, Weight(2 * c, c, 1, per="pixel")]
    mlp_out: Annotated[Tensor, Weight(c, 2 * c, 1, per="pixel")]
    alpha_att: Annotated[Tensor, Weight(1, around=1)]
    alpha_conv: Annotated[Tensor, Weight(1, around=1)]
    alpha_mlp: Annotated[Tensor, Weight(1, around=1)]
    project_out: Annotated[Tensor, Weight(C, C, 1, 1, per="pixel")]


DESCRIPTION = Description(MixerWeights)
LEARNED = DESCRIPTION.learned
"""The weights that have gradients, in order."""


def shapes(channels: int, heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, for `channels` of x and `hidden` gated channels."""
    return DESCRIPTION.shapes(C=channels, c=channels // 3, h=hidden, heads=heads)


def statistics_shapes(batch: int, channels: int, heads: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of what forward keeps for backward (`Statistics`), for `channels` of x."""
    branch = channels // 3
    depth = branch // heads
    return (batch, heads, 2 * depth + 2, depth), (batch, branch, TAPS), (batch, branch), (branch,), (branch,)


class Statistics(NamedTuple):
    """The small tensors that backward needs, in the dtype of the accumulator. d is the number of channels of a head."""

    attention: Tensor  # [B, heads, 2d + 2, d]: the softmax, q k^T, |q| and |k|
    kernels: Tensor  # [B, c, 49]: generated
    branch_mean: Tensor  # [B, c]: of each sample's input of the gated CNN
    batch_mean: Tensor  # [c]: what its batch norm used
    batch_var: Tensor  # [c]


class BatchNorm(NamedTuple):
    """The statistics of the branch's input x [B, c, H, W], in the dtype of the accumulator."""

    branch_mean: Tensor  # [B, c]: of each sample
    batch_mean: Tensor  # [c]: of the batch in training, running otherwise
    batch_var: Tensor  # [c], biased

    def normalise(self, values: Tensor, eps: float) -> Tensor:
        """`values` [B, c, ...] less the mean, over the deviation."""
        shape = (1, -1) + (1,) * (values.dim() - 2)
        return (values - self.batch_mean.view(shape)) * (self.batch_var + eps).rsqrt().view(shape)


def scale_of(x: Tensor, branch_scale: Tensor | None) -> Tensor:
    """[B], contiguous, in the dtype of the accumulator."""
    dtype = accumulator(x.dtype)
    if branch_scale is None:
        return x.new_ones(x.shape[:1], dtype=dtype)
    return branch_scale.to(dtype).contiguous()
