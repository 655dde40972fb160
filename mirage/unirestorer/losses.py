"""What a router learns from: the restored images, how far embeddings lie from their leaf's centre, and balance.

total = L1 + 0.1 L_dg + 0.01 L_aux (UniRestorer, arXiv 2412.20157).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mirage.unirestorer.router import Router, Routes

__all__ = ["BALANCE", "RouterLoss", "RouterTerms", "balance_loss", "centre_loss", "cv_squared"]

BALANCE = ("levels", "leaves", "both")
"""Of what the images' probabilities shall be even over a batch."""

TINY = 1e-10
LEAF_WEIGHT = 0.1  # of the cross-entropy beside expected errors


def cv_squared(probabilities: Tensor) -> Tensor:
    """The squared coefficient of variation of the mass that a batch puts on each choice: 0 where it is even.

    Args:
        probabilities: ``[B, N]``, not negative.

    Returns:
        A scalar: unbiased variance over squared mean (and 1e-10) of the sums over the batch, which are divided by
        their total; 0 for one choice.
    """
    if probabilities.ndim != 2 or not probabilities.numel():
        raise ValueError(f"probabilities: expected [B, N], not empty, got {list(probabilities.shape)}")
    if probabilities.shape[1] == 1:
        return probabilities.sum() * 0
    mass = probabilities.sum(0)
    mass = F.normalize(mass, p=1, dim=0)
    return mass.var(unbiased=True) / (mass.mean().square() + TINY)


def balance_loss(routes: Routes, over: str = "levels") -> Tensor:
    """L_aux: `cv_squared` of the probabilities of levels, of leaves, or the sum of both.

    Raises:
        ValueError: ``over`` is none of ``"levels"``, ``"leaves"`` and ``"both"``.
    """
    if over not in BALANCE:
        raise ValueError(f"balance: expected one of {', '.join(BALANCE)}, got {over!r}")
    chosen = {"levels": [routes.p_level], "leaves": [routes.p_leaf], "both": [routes.p_level, routes.p_leaf]}[over]
    return sum((cv_squared(each) for each in chosen[1:]), cv_squared(chosen[0]))


def centre_loss(centres: Tensor, degradation: Tensor, log_variance: Tensor) -> Tensor:
    """L_dg: how unlikely the leaves' centres u are under N(e, v), up to a constant; least at ln v = ln (u - e)^2.

    Args:
        centres: ``[B, dim]``: of each image's own leaf.
        degradation: ``[B, dim]``: e, of the router's first head.
        log_variance: ``[B, dim]``: s = ln v, of `Router.log_variance`.

    Returns:
        The mean over batch and dimensions of ``(u - e)^2 / (2 exp s) + s / 2``.
    """
    if not centres.shape == degradation.shape == log_variance.shape:
        shapes = [list(each.shape) for each in (centres, degradation, log_variance)]
        raise ValueError(f"centres, degradation, log_variance: expected equal shapes, got {shapes}")
    return ((centres - degradation).square() * (-log_variance).exp() / 2 + log_variance / 2).mean()


class RouterTerms(NamedTuple):
    """The terms of the loss, before their weights."""

    l1: Tensor
    centre: Tensor
    balance: Tensor


class RouterLoss(nn.Module):
    """The loss that a router trains with.

    Args:
        centre_weight: of L_dg.
        balance_weight: of L_aux.
        balance: ``"levels"``, ``"leaves"`` or ``"both"``.

    Raises:
        ValueError: a weight is negative or not finite, or ``balance`` is unknown.
    """

    def __init__(self, centre_weight: float = 0.1, balance_weight: float = 0.01, balance: str = "levels") -> None:
        super().__init__()
        for name, value in (("centre_weight", centre_weight), ("balance_weight", balance_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        if balance not in BALANCE:
            raise ValueError(f"balance: expected one of {', '.join(BALANCE)}, got {balance!r}")
        self.centre_weight, self.balance_weight, self.balance = centre_weight, balance_weight, balance

    def forward(
        self, restored: Tensor, clean: Tensor, routes: Routes, centres: Tensor, router: Router
    ) -> tuple[Tensor, RouterTerms]:
        """The loss of a batch, and its terms.

        Args:
            restored: ``[B, 3, H, W]``, of `straight_through`.
            clean: of the same shape.
            routes: of the router in training mode.
            centres: ``[B, dim]``: of the leaf that each image's embedding belongs to.
            router: whose variances count.
        """
        l1 = F.l1_loss(restored, clean)
        centre = centre_loss(centres, routes.degradation, router.log_variance(routes.uncertainty))
        balance = balance_loss(routes, self.balance)
        total = l1 + self.centre_weight * centre + self.balance_weight * balance
        return total, RouterTerms(l1, centre, balance)

    def expected(
        self, errors: Tensor, leaves: Tensor, routes: Routes, centres: Tensor, router: Router
    ) -> tuple[Tensor, RouterTerms]:
        """The loss of a batch where each image was restored on all levels, in the place of `forward`.

        The first term is the mean error that the levels' probabilities lead to expect, and besides 0.1 times the
        cross-entropy of the leaves: so a level gains where it restores better than others, and not only by the error
        of the one that was chosen.

        Args:
            errors: ``[B, T]``: mean absolute error of each image by the experts of its leaf's path.
            leaves: int64 ``[B]``: the leaf that each image's embedding belongs to.
            routes, centres, router: as of `forward`.
        """
        l1 = (routes.p_level * errors).sum(1).mean() + LEAF_WEIGHT * F.cross_entropy(routes.logits_leaf, leaves)
        centre = centre_loss(centres, routes.degradation, router.log_variance(routes.uncertainty))
        balance = balance_loss(routes, self.balance)
        total = l1 + self.centre_weight * centre + self.balance_weight * balance
        return total, RouterTerms(l1, centre, balance)
