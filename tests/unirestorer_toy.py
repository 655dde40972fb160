"""A system small enough to reason about: degradations add stripes, and experts take off those of their node.

Stripes have the mean 0, so that what an expert leaves is not a change of brightness, which would have a gradient of its
own sign through the gates.
"""

from __future__ import annotations

import torch
from torch import nn

from mirage.unirestorer import ExpertModules, Router
from mirage.unirestorer.tree import ExpertTree, Node

OFFSETS = torch.tensor([[0.30, 0.20, 0.0], [0.30, -0.20, 0.0], [-0.30, 0.0, 0.20], [-0.30, 0.0, -0.20]])
"""How much of three kinds of stripes the leaves' degradations add: two groups of two."""

TASKS = ("rows more", "rows less", "columns more", "columns less")
PER_LEAF = 10


def stripes(height, width):
    """``[3, height, width]`` of 1 and -1, orthogonal where sides are multiples of 8: rows, columns, a chessboard."""
    rows = 1.0 - 2 * (torch.arange(height) % 2)[:, None].expand(height, width)
    columns = 1.0 - 2 * (torch.arange(width) % 2)[None].expand(height, width)
    return torch.stack([rows, columns, rows * columns])


def added(amounts, height, width):
    """What is added to images for amounts ``[B, 3]``: ``[B, 3, height, width]``, equal in all colours."""
    pattern = torch.einsum("bk,khw->bhw", amounts, stripes(height, width))
    return pattern[:, None].expand(-1, 3, -1, -1)


class Takes(nn.Module):
    """Takes stripes off."""

    def __init__(self, amounts):
        super().__init__()
        self.amounts = nn.Parameter(amounts.clone())

    def forward(self, x):
        return x - added(self.amounts[None], *x.shape[2:]).to(x.dtype)


class Stripes(nn.Module):
    """How much there is of each kind of stripes, in a basis of its own."""

    dim = 8
    fingerprint = "stripes"

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("turn", torch.randn(3, self.dim, generator=generator))

    def embed(self, images):
        height, width = images.shape[2:]
        patterns = stripes(height, width)
        amounts = torch.einsum("bhw,khw->bk", images.float().mean(1), patterns) / (height * width)
        return amounts @ self.turn


def tree():
    """Of ten samples of each leaf."""
    turn = Stripes().turn
    members = torch.arange(4 * PER_LEAF).reshape(4, PER_LEAF)
    groups = [[0, 1, 2, 3], [0, 1], [2, 3], [0], [1], [2], [3]]
    parents, levels = [None, 0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2, 2]
    return ExpertTree(
        Node(
            i, levels[i], parents[i], (OFFSETS[group].mean(0) @ turn).double(), members[group].flatten(),
            {TASKS[leaf]: PER_LEAF for leaf in group},
        )
        for i, group in enumerate(groups)
    )  # fmt: skip


def experts():
    groups = [[0, 1, 2, 3], [0, 1], [2, 3], [0], [1], [2], [3]]
    return [Takes(OFFSETS[group].mean(0)) for group in groups]


def router(seed=0, scale=0.5):
    """Of the tree, with gates that are not zero and heads that have seen a batch."""
    torch.manual_seed(seed)
    made = Router(tree().paths, Stripes.dim)
    for gate in (made.lf_gate, made.layer_gate):
        nn.init.normal_(gate[0].weight, std=scale)
    for head in (made.mu, made.sigma):
        head[-1].momentum = 1.0
    made.train()(Stripes().embed(batch(64)[0]))
    return made.eval()


def parts(**options):
    return Stripes(), tree(), router(**options), ExpertModules(experts())


def batch(count, jitter=0.02, size=8, generator=None, offsets=OFFSETS):
    """Degraded images, clean ones, and which of the offsets each has."""
    clean = 0.5 + 0.05 * torch.randn(count, 3, size, size, generator=generator)
    leaf = torch.randint(len(offsets), (count,), generator=generator)
    amounts = offsets[leaf] + jitter * torch.randn(count, 3, generator=generator)
    return clean + added(amounts, size, size), clean, leaf


def work(fabric, root, overrides):
    """What each of two processes does: trains a router for two steps in each mode, and writes what it has then."""
    from train_cases import settings

    from mirage.unirestorer import RouterRun, RouterSettings

    torch.set_num_threads(1)
    results = {}
    for variance in ("affine", "log", "literal"):
        extractor, own_tree, _, own_experts = parts()
        config = settings(root, *overrides, out=variance)
        run = RouterRun(config, extractor, own_tree, own_experts, RouterSettings(variance), fabric)
        seen = []
        warn = run._warn
        run._warn = lambda used, seen=seen, warn=warn: (seen.append(used.clone()), warn(used))
        run.train()
        results[variance] = {**run.network.state_dict(), "used": seen[0]}
    torch.save(results, root / f"rank{fabric.global_rank}.pt")
