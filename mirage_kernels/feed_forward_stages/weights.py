"""What ``feed_forward_stages`` takes of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirage_kernels.feed_forward_stage.weights import COUNT, FeedForwardWeights

TENSORS = COUNT + 1
"""How many tensors a stage may have: its weights and its scale."""


class ScaledFeedForward(NamedTuple):
    """A stage: its weights, what is added to its norm's variance, and the number for each channel that what it adds to
    its input is multiplied by, or None. `scale` has C elements in any shape, floating point, of any dtype."""

    weights: FeedForwardWeights
    eps: float = 1e-5
    scale: Tensor | None = None


def packed(stages: Iterable[ScaledFeedForward]) -> tuple[list[Tensor], list[int], list[float]]:
    """What the operator takes of all stages: the tensors that there are; their places among `TENSORS` a stage, as a
    number for each stage whose bits say which are there (lists with None can be exported, but not traced); epsilons."""
    tensors: list[Tensor] = []
    present: list[int] = []
    eps: list[float] = []
    for weights, of_norm, scale in stages:
        bits = 0
        for place, tensor in enumerate((*weights, scale)):
            if tensor is not None:
                tensors.append(tensor)
                bits |= 1 << place
        present.append(bits)
        eps.append(of_norm)
    return tensors, present, eps


def with_absent(tensors: Sequence[Any], present: Sequence[int]) -> list[Any]:
    """`TENSORS` of each stage, None where one is absent."""
    expected = sum(bits.bit_count() for bits in present)
    if len(tensors) != expected:
        raise ValueError(f"weights: expected {expected} tensors, by the bits of present, got {len(tensors)}")
    given = iter(tensors)
    return [next(given) if bits >> place & 1 else None for bits in present for place in range(TENSORS)]


def unpacked(tensors: Sequence[Tensor], present: Sequence[int], eps: Sequence[float]) -> list[ScaledFeedForward]:
    """The stages of such lists."""
    every = with_absent(tensors, present)
    stages = []
    for i, of_norm in enumerate(eps):
        *weights, scale = every[TENSORS * i : TENSORS * (i + 1)]
        stages.append(ScaledFeedForward(FeedForwardWeights(*weights), of_norm, scale))
    return stages


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
