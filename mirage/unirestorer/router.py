"""`Router`: from an embedding of an image's degradation to a leaf of a tree of experts, and to a level of its path.

Two heads on the embedding: one for the degradation, from which a gate picks a leaf, and one for how sure that is, from
which a gate picks how far down its path to go. The expert is the node of the leaf's path at that level (UniRestorer,
arXiv 2412.20157; as in its released inference code, with what that code gets wrong left out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNCERTAINTY", "Router", "Routes", "straight_through"]

UNCERTAINTY = ("affine", "log", "literal")
"""How the second head's output stands for the variance of the embedding around its leaf's centre."""

LAYERS = 5  # of a head
SLOPE = 0.1  # of its leaky ReLUs
LEAST_NOISE = 0.01  # standard deviation in training beyond softplus of what the gate says
LEAST_VARIANCE = 1e-6  # of "literal"
GAMMA, BETA = 1e-4, -7.0  # that "affine" begins with


@dataclass(eq=False)
class Routes:
    """Where a batch of B images goes, of K leaves and T levels.

    Attributes:
        leaf: int64 ``[B]``, from 0 to K - 1.
        level: int64 ``[B]``; 0 is the root, T - 1 the leaves.
        expert: int64 ``[B]``: the number of the node of the leaf's path at that level.
        gate: ``[B]``: the probability of the leaf plus that of the router's level; what gradients of the gates pass
            through.
        p_leaf, p_level: ``[B, K]`` and ``[B, T]``, of which each row sums to 1.
        logits_leaf, logits_level: of the same shapes, before the softmax, masks and in training noise included.
        degradation: ``[B, dim]``, of the first head.
        uncertainty: ``[B, dim]``, of the second head, as it is; `Router.log_variance` makes a variance of it.
    """

    leaf: Tensor
    level: Tensor
    expert: Tensor
    gate: Tensor
    p_leaf: Tensor
    p_level: Tensor
    logits_leaf: Tensor
    logits_level: Tensor
    degradation: Tensor
    uncertainty: Tensor

    def __len__(self) -> int:
        return len(self.leaf)


class Router(nn.Module):
    """Picks a leaf and a level for each embedding.

    Both gates begin as zeros: whatever the image, all probabilities are equal then, and in evaluation mode the expert
    is the root. In training mode logits get Gaussian noise of a standard deviation that the gates learn.

    Args:
        paths: ``[K, T]``, integers: the experts' numbers on the path from the root to each leaf. All paths begin with
            the same root.
        dim: of embeddings.
        variance: what the second head's output h says of the variance v: ``"affine"``, ln v = gamma h + beta with two
            learnt numbers; ``"log"``, ln v = h; ``"literal"``, v = softplus(h) + 1e-6.

    Raises:
        ValueError: ``paths`` is no such table, or ``variance`` is unknown.

    Parameters are named as the released code names them (``mu``, ``sigma``, ``lf_gate``, ``layer_gate``). Its
    checkpoints need not hold ``gamma`` and ``beta``, which keep their values then.
    """

    paths: Tensor

    def __init__(self, paths: Tensor | Sequence[Sequence[int]], dim: int = 512, *, variance: str = "affine") -> None:
        super().__init__()
        if variance not in UNCERTAINTY:
            raise ValueError(f"variance: expected one of {', '.join(UNCERTAINTY)}, got {variance!r}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        table = _table(paths)
        self.config: dict[str, Any] = {"paths": table.tolist(), "dim": dim, "variance": variance}
        self.dim, self.variance = dim, variance
        self.register_buffer("paths", table, persistent=False)
        self.mu, self.sigma = _head(dim), _head(dim)
        self.lf_gate = nn.Sequential(nn.Linear(dim, 2 * self.leaves, bias=False))
        self.layer_gate = nn.Sequential(nn.Linear(dim, 2 * self.levels, bias=False))
        for gate in (self.lf_gate, self.layer_gate):
            nn.init.zeros_(gate[0].weight)  # type: ignore[arg-type]
        learnt = variance == "affine"  # nothing else uses them, which is no weight's place in a synchronised training
        self.gamma = nn.Parameter(torch.tensor(GAMMA), requires_grad=learnt)
        self.beta = nn.Parameter(torch.tensor(BETA), requires_grad=learnt)

    @property
    def leaves(self) -> int:
        """K."""
        return self.paths.shape[0]

    @property
    def levels(self) -> int:
        """T."""
        return self.paths.shape[1]

    @property
    def experts(self) -> int:
        """Experts that a route can lead to, if they are numbered from 0 without gaps."""
        return int(self.paths.max()) + 1

    def forward(
        self,
        embeddings: Tensor,
        leaf_mask: Tensor | None = None,
        *,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Routes:
        """Route a batch. Of equal probabilities the first one counts: the lower leaf, and the coarser level.

        Args:
            embeddings: ``[B, dim]``, floating point.
            leaf_mask: bool ``[K]`` or ``[B, K]``: the leaves that may be picked; others have probability 0.
            noise: standard normal numbers ``[B, K]`` and ``[B, T]`` in the place of those that training draws from
                PyTorch's default generator.

        Raises:
            ValueError: another shape; values that are not finite; a mask that leaves an image no leaf; noise in
                evaluation mode, which has none; or a batch of one in training mode.
        """
        self._check(embeddings, noise)
        degradation, uncertainty = self.mu(embeddings), self.sigma(embeddings)
        noise_leaf, noise_level = noise or (None, None)
        logits_leaf = self._logits(self.lf_gate(degradation), noise_leaf)
        logits_level = self._logits(self.layer_gate(uncertainty), noise_level)
        if leaf_mask is not None:
            logits_leaf = logits_leaf.masked_fill(~self._mask(leaf_mask, embeddings), -math.inf)
        p_leaf, p_level = logits_leaf.softmax(1), logits_level.softmax(1)
        if not bool(torch.isfinite(p_leaf).all() & torch.isfinite(p_level).all()):
            raise ValueError("embeddings: expected finite values, which give finite logits, got others")
        leaf, level = p_leaf.argmax(1), p_level.argmax(1)  # the first one of equal ones
        gate = p_leaf.gather(1, leaf[:, None])[:, 0] + p_level.gather(1, level[:, None])[:, 0]
        return Routes(
            leaf, level, self.paths[leaf, level], gate, p_leaf, p_level, logits_leaf, logits_level, degradation,
            uncertainty,
        )  # fmt: skip

    def log_variance(self, uncertainty: Tensor) -> Tensor:
        """ln v, ``[B, dim]``: of the first head's output around its leaf's centre, number by number.

        Args:
            uncertainty: ``[B, dim]``, of the second head (`Routes.uncertainty`).
        """
        if self.variance == "affine":
            return self.gamma * uncertainty + self.beta
        if self.variance == "log":
            return uncertainty
        return (F.softplus(uncertainty) + LEAST_VARIANCE).log()

    def _logits(self, gate: Tensor, noise: Tensor | None) -> Tensor:
        """The logits that are in the first half of a gate's output, with noise as wide as the second half says."""
        logits, raw = gate.chunk(2, dim=1)
        if not self.training:
            return logits
        noise = torch.randn_like(logits) if noise is None else noise.to(logits)
        return logits + noise * (F.softplus(raw) + LEAST_NOISE)

    def _check(self, embeddings: Tensor, noise: tuple[Tensor, Tensor] | None) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings: expected [B, {self.dim}], got {list(embeddings.shape)}")
        if self.training and len(embeddings) == 1:
            raise ValueError(
                "embeddings: expected two or more in training mode, got one: the heads end in batch normalisation, "
                "which takes mean and variance over the batch; call eval() to route single images"
            )
        if noise is None:
            return
        if not self.training:
            raise ValueError("noise: expected None in evaluation mode, which has none; call train() first")
        expected = [[len(embeddings), self.leaves], [len(embeddings), self.levels]]
        if [list(each.shape) for each in noise] != expected:
            raise ValueError(f"noise: expected shapes {expected}, got {[list(each.shape) for each in noise]}")

    def _mask(self, mask: Tensor, embeddings: Tensor) -> Tensor:
        wanted = (len(embeddings), self.leaves)
        if mask.dtype != torch.bool or tuple(mask.shape) not in (wanted, wanted[1:]):
            raise ValueError(
                f"leaf_mask: expected bool [{self.leaves}] or {list(wanted)}, got {mask.dtype} {list(mask.shape)}"
            )
        if not bool(mask.any(-1).all()):
            raise ValueError("leaf_mask: expected at least one leaf for every image, got a row without any")
        return mask.to(embeddings.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        for name in ("gamma", "beta"):
            state_dict.setdefault(prefix + name, getattr(self, name).detach())
        super()._load_from_state_dict(state_dict, prefix, *others)


def straight_through(restored: Tensor, gate: Tensor) -> Tensor:
    """``restored * gate / gate`` of which the divisor counts as constant: the same values to the bit, and a gradient of
    the gate, through which a loss of the restored images reaches a router.

    Args:
        restored: ``[B, C, H, W]``, of the experts.
        gate: ``[B]``, positive (`Routes.gate`).
    """
    return restored * (gate / gate.detach()).to(restored.dtype)[:, None, None, None]


def _head(dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(LAYERS):
        layers += [nn.LeakyReLU(SLOPE)] if number else []
        layers.append(nn.Linear(dim, dim, bias=False))
    return nn.Sequential(*layers, nn.BatchNorm1d(dim))


def _table(paths: Tensor | Sequence[Sequence[int]]) -> Tensor:
    try:
        table = torch.as_tensor(paths)
    except (TypeError, ValueError) as error:
        raise ValueError(f"paths: expected a table [K, T] of experts' numbers, got {paths!r}") from error
    if table.ndim != 2 or not table.numel() or table.is_floating_point() or table.dtype == torch.bool:
        raise ValueError(f"paths: expected integers [K, T], got {table.dtype} {list(table.shape)}")
    if bool((table < 0).any()):
        raise ValueError(f"paths: expected experts' numbers from 0 on, got {int(table.min())}")
    if bool((table[:, 0] != table[0, 0]).any()):
        raise ValueError(f"paths: expected paths from one root, got {table[:, 0].unique().tolist()}")
    return table.to(torch.int64).cpu().clone()
