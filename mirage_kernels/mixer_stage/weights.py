"""What the implementations of ``mixer_stage`` exchange: weights and statistics, with names, order and shapes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mirage_kernels._runtime.library import accumulator

TAPS = 49
"""Of a generated kernel, 7x7."""


class MixerWeights(NamedTuple):
    """Parameters and running statistics of the first half of a block with C = 3c channels, in the shapes that
    `mirage.blocks` holds them; h is the number of gated channels (``int(8 / 3 * c)`` in MIRAGE)."""

    norm_weight: Tensor  # [C], of norm1
    norm_bias: Tensor  # [C]
    qkv: Tensor  # [3c, c, 1, 1]
    qkv_dwconv: Tensor  # [3c, 1, 3, 3]
    temperature: Tensor  # [heads, 1, 1]
    bn_weight: Tensor  # [c], of the gated CNN's batch norm
    bn_bias: Tensor  # [c]
    bn_mean: Tensor  # [c], running mean: no gradient, and not read in training
    bn_var: Tensor  # [c], running variance: as the mean
    gic1: Tensor  # [2h, c, 1, 1]: rows of the gate (h), the identity (h - c) and the detail (c)
    generator_in: Tensor  # [c, c, 1, 1]
    generator_out: Tensor  # [49c, c, 1, 1]
    gate_temperature: Tensor  # [1]
    gic2: Tensor  # [c, h, 1, 1]
    proj_out: Tensor  # [c, c, 1, 1]
    mlp_in: Tensor  # [2c, c, 1]
    mlp_out: Tensor  # [c, 2c, 1]
    alpha_att: Tensor  # [1]
    alpha_conv: Tensor  # [1]
    alpha_mlp: Tensor  # [1]
    project_out: Tensor  # [C, C, 1, 1]


BUFFERS = ("bn_mean", "bn_var")
LEARNED = tuple(name for name in MixerWeights._fields if name not in BUFFERS)
"""The weights that have gradients, in order."""


def shapes(channels: int, heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, for `channels` of x and `hidden` gated channels."""
    branch = channels // 3
    return {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "qkv": (3 * branch, branch, 1, 1),
        "qkv_dwconv": (3 * branch, 1, 3, 3),
        "temperature": (heads, 1, 1),
        "bn_weight": (branch,),
        "bn_bias": (branch,),
        "bn_mean": (branch,),
        "bn_var": (branch,),
        "gic1": (2 * hidden, branch, 1, 1),
        "generator_in": (branch, branch, 1, 1),
        "generator_out": (TAPS * branch, branch, 1, 1),
        "gate_temperature": (1,),
        "gic2": (branch, hidden, 1, 1),
        "proj_out": (branch, branch, 1, 1),
        "mlp_in": (2 * branch, branch, 1),
        "mlp_out": (branch, 2 * branch, 1),
        "alpha_att": (1,),
        "alpha_conv": (1,),
        "alpha_mlp": (1,),
        "project_out": (channels, channels, 1, 1),
    }


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
