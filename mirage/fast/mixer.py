"""The first half of a block by `mirage_kernels.mixer_stage`, and what depends on the batch in it: running statistics
and stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mirage_kernels
from mirage_kernels._runtime.checks import dtype_of_convolutions

_WEIGHTS = len(mirage_kernels.MixerWeights._fields)


def run_mixer(block: nn.Module, x: Tensor, found: tuple[Any, ...]) -> Tensor:
    """`found`: what `MIXER_STAGE` finds in a block."""
    weights = mirage_kernels.MixerWeights(*found[:_WEIGHTS])
    norm_eps, bn_eps, norm, momentum, drop_path = found[_WEIGHTS:]
    scale = branch_scale(drop_path, x)
    y, mean, variance = mirage_kernels.mixer_stage(x, weights, scale, norm.training, norm_eps, bn_eps)
    if norm.training:
        with torch.no_grad():
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            _update(weights.bn_mean, mean, momentum)
            count = x.shape[0] * x.shape[2] * x.shape[3]
            _update(weights.bn_var, variance * (count / (count - 1)), momentum)
    return y


def _update(running: Tensor, value: Tensor, momentum: float) -> None:
    """What `nn.BatchNorm2d` does in training with a mean or an unbiased variance."""
    if running.dtype == value.dtype:
        running.mul_(1 - momentum).add_(value, alpha=momentum)
    else:
        running.copy_((1 - momentum) * running.to(value.dtype) + momentum * value)


def branch_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factor of each sample of x, [B], or None: what `drop_path` multiplies by.

    It is asked for its result on ones, one value per sample: random numbers are drawn in the same order and number,
    and in the same dtype, as they would be on the branch itself.
    """
    if type(drop_path) is nn.Identity or not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    return drop_path(x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype_of_convolutions(x))).view(-1)
