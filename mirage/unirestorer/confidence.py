"""How far down its leaf's path an image goes by the leaves' probabilities: the finest node that is likely enough.

"Hedging your bets" (Deng et al. 2012) answers with nodes of a tree of classes, as specific as an accuracy allows, where
a node's probability is the sum of its leaves'. Here it is the most specific node on one path above a limit. UniRestorer
(arXiv 2412.20157) has the gate of levels in its place, which `mirage.unirestorer.Router` computes; this is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_confidence", "finest_level", "path_shares"]


def check_confidence(confidence: float | None) -> float | None:
    """The limit as it came.

    Raises:
        ValueError: it is neither None nor in (0, 1].
    """
    if confidence is not None and not 0 < confidence <= 1:
        raise ValueError(f"confidence: expected a number above 0 and at most 1, or None, got {confidence}")
    return confidence


def path_shares(p_leaf: Tensor, leaf: Tensor, paths: Tensor) -> Tensor:
    """The part of the leaves' probability that each node on the path of the chosen leaf has, float64 ``[B, T]``.

    Args:
        p_leaf: ``[B, K]``, not negative; leaves that were masked have 0.
        leaf: int64 ``[B]``, from 0 to K - 1.
        paths: int64 ``[K, T]``: the numbers of the nodes from the root to each leaf (`ExpertTree.paths`).

    The root has exactly 1, however the probabilities' sum was rounded.
    """
    p = p_leaf.double()
    elsewhere = paths[None] != paths[leaf][:, None]  # [B, K, T]
    # what lies elsewhere, and not what lies inside: nothing lies outside the root, and little outside a likely leaf,
    # whose own probability is rounded to 1 long before the others' are 0
    outside = (p[:, :, None] * elsewhere).sum(1)
    return 1 - outside / p.sum(1, keepdim=True)


def finest_level(shares: Tensor, confidence: float) -> Tensor:
    """The finest level whose node has at least ``confidence`` of the probability, int64 ``[B]``.

    Args:
        shares: ``[B, T]``, of `path_shares`.
        confidence: in (0, 1]. Level 0 has everything, and so is there for any.
    """
    levels = torch.arange(shares.shape[1], device=shares.device)
    return torch.where(shares >= confidence, levels, 0).amax(1)
