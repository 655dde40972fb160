"""``feed_forward_stages`` in plain PyTorch: the reference of the stage, scaled, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mirage_kernels.feed_forward_stage.reference import feed_forward_stage
from mirage_kernels.feed_forward_stages.weights import ScaledFeedForward


def feed_forward_stages(
    x: Tensor,
    stages: Sequence[ScaledFeedForward],
    norm: str = "centred",
    activation: str = "gelu",
    gate: str = "gelu",
) -> Tensor:
    for weights, eps, scale in stages:
        y = feed_forward_stage(x, *weights, eps, norm, activation, gate)
        x = y if scale is None else x + (y - x) * scale.view(1, -1, 1, 1)
    return x
