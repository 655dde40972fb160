"""What an extractor learns from: embeddings of one type and strength of degradation together, others apart.

CLIP's loss takes the one caption of an image as right and all others in the batch as wrong, equal ones included. Here
every sample of the same type and strength is right (supervised contrastive learning, arXiv 2004.11362), and those of
the same type at another strength are right in part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["contrastive_loss", "contrastive_targets", "label_relations", "type_of"]


def type_of(label: str) -> str:
    """The type in a label: what stands before the first ``/``, as in ``"noise/large"``."""
    return label.partition("/")[0]


def label_relations(labels: Sequence[str], related: float) -> Tensor:
    """How right it is to take one label for another: 1 for itself, ``related`` for its type at another strength, or 0.

    Args:
        labels: different ones, ``"type/strength"`` or ``"type"``.
        related: 0 to 1.

    Returns:
        float32 ``[labels, labels]``.

    Raises:
        ValueError: ``related`` is outside of that.
    """
    if not 0 <= related <= 1:
        raise ValueError(f"related: expected 0 to 1, got {related}")
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(map(type_of, labels)))}
    types = torch.tensor([numbers[type_of(label)] for label in labels])
    relations = related * (types[:, None] == types).float()
    return relations.fill_diagonal_(1.0)


def contrastive_targets(numbers: Tensor, relations: Tensor) -> Tensor:
    """How much of its probability each sample should give to each other one; rows sum to 1.

    Others share it in proportion to how right they are. A sample gives itself nothing, and a row of one without any
    that is right is 0.

    Args:
        numbers: of the samples' labels, int64 ``[N]``.
        relations: as `label_relations` makes them.

    Returns:
        float32 ``[N, N]``.
    """
    weights = relations[numbers][:, numbers].fill_diagonal_(0.0)
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-12)


def contrastive_loss(embeddings: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between ``targets`` and the softmax of cosines over ``temperature`` to all other samples.

    Args:
        embeddings: ``[N, dim]``.
        targets: ``[N, N]``, as `contrastive_targets` makes them; rows of 0 do not count.
        temperature: of the softmax.

    Returns:
        The mean over the rows that count, float32; 0 where none does.
    """
    z = torch.nn.functional.normalize(embeddings.float())
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -math.inf)
    log_p = logits.log_softmax(1).masked_fill(itself, 0.0)
    targets = targets.to(z.device)
    return -(targets * log_p).sum() / (targets.sum(1) > 0).sum().clamp(min=1)
