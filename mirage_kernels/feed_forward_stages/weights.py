"""What ``feed_forward_stages`` takes of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirage_kernels.feed_forward_stage.weights import COUNT, FeedForwardWeights

TENSORS = COUNT + 1
"""How many tensors a stage has in the operator's list: its weights, None for those that are absent, and its scale."""


class ScaledFeedForward(NamedTuple):
    """A stage: its weights, what is added to its norm's variance, and the number for each channel that what it adds to
    its input is multiplied by, or None. `scale` has C elements in any shape, floating point, of any dtype."""

    weights: FeedForwardWeights
    eps: float = 1e-5
    scale: Tensor | None = None


def packed(stages: Iterable[ScaledFeedForward]) -> tuple[list[Tensor | None], list[float]]:
    """Tensors and epsilons of all stages, as the operator takes them."""
    tensors: list[Tensor | None] = []
    eps: list[float] = []
    for weights, of_norm, scale in stages:
        tensors += weights
        tensors.append(scale)
        eps.append(of_norm)
    return tensors, eps


def unpacked(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> list[ScaledFeedForward]:
    """The stages of such lists."""
    return [
        ScaledFeedForward(
            FeedForwardWeights(*tensors[TENSORS * i : TENSORS * i + COUNT]),  # type: ignore[arg-type]
            of_norm,
            tensors[TENSORS * i + COUNT],
        )
        for i, of_norm in enumerate(eps)
    ]


def folded(stage: ScaledFeedForward) -> FeedForwardWeights:
    """Weights of a stage without a scale that computes the same: its last convolution takes the scale in. Gradients
    reach both."""
    weights, _, scale = stage
    if scale is None:
        return weights
    wide = torch.promote_types(torch.promote_types(scale.dtype, weights.project_out.dtype), torch.float32)
    scale = scale.to(wide).flatten()
    bias = weights.project_out_bias
    return weights._replace(
        project_out=weights.project_out * scale.view(-1, 1, 1, 1),
        project_out_bias=None if bias is None else bias * scale,
    )
