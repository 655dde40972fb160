"""The training of a router, over the trainer of networks: experts and extractor are there, and do not change."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirage.checkpoint import CheckpointError
from mirage.train.config import Config, ConfigError
from mirage.train.run import Run
from mirage.train.state import State
from mirage.unirestorer.dispatcher import Experts
from mirage.unirestorer.extractors import Extractor
from mirage.unirestorer.losses import RouterLoss
from mirage.unirestorer.router import Router, Routes, straight_through
from mirage.unirestorer.tree import ExpertTree
from mirage.whole_files import safetensors_bytes, write_whole

__all__ = ["RoutedNetwork", "RouterRun", "RouterSettings", "collapsed_experts", "load_router", "save_router"]

FORMAT = "mirage unirestorer router, version 1"
PREFIX = "router."
COLLAPSED = 0.01
"""Of its share of the images, below which an expert counts as collapsed."""

BALANCE_WEIGHTS = {"gate": 0.01, "expected": 0.0}
"""By objective. Where every level is tried on every image none is forgotten, and a weight of 0.01 outweighs what levels
differ by: it sent a third of all images to a root that restored them worst."""

OBJECTIVES = tuple(BALANCE_WEIGHTS)
ENOUGH = 20.0
"""Images that an expert's share has to come to, before anything is said of it."""


@dataclass(frozen=True)
class RouterSettings:
    """What of a router's training a configuration does not say.

    Attributes:
        variance: of `Router`.
        centre_weight, balance: of `RouterLoss`.
        balance_weight: of `RouterLoss`; None: `BALANCE_WEIGHTS` of the objective.
        objective: ``"gate"``, as described and released: the chosen expert's error, whose gradient reaches the gates
            through `straight_through`; or ``"expected"``, ours: the error to be expected by the probabilities of the
            levels, for which each image is restored on all levels of its leaf's path (`RouterLoss.expected`).

    Raises:
        ValueError: an unknown objective.
    """

    variance: str = "affine"
    centre_weight: float = 0.1
    balance_weight: float | None = None
    balance: str = "levels"
    objective: str = "gate"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.balance_weight is None:
            object.__setattr__(self, "balance_weight", BALANCE_WEIGHTS[self.objective])


class RoutedNetwork(nn.Module):
    """A router with experts behind it, as a network that restores. Its parameters are the router's alone.

    In training mode it returns the restored images (through `straight_through`), the routes, and the centres of the
    leaves that the images' embeddings belong to, ``[B, dim]``; in evaluation mode the restored images. Where clean
    images are given in training mode, it returns the errors on all levels of the leaves' paths, ``[B, T]``, the routes,
    the centres and the numbers of those leaves.

    Args:
        router: trains.
        extractor, tree, experts: do not.

    Attributes:
        seen: how many images went to each expert in evaluation mode, since it was set to 0.
    """

    def __init__(self, router: Router, extractor: Extractor, tree: ExpertTree, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.config = router.config
        centres = tree.centres[list(tree.leaves)].float()
        if centres.shape[1] != router.dim:
            raise ValueError(f"router: expected dim {centres.shape[1]}, that of the tree's centres, got {router.dim}")
        self._frozen = _Frozen(extractor, tree, experts, centres)
        self.seen = torch.zeros(len(tree), dtype=torch.int64)

    def forward(self, degraded: Tensor, clean: Tensor | None = None) -> Any:
        extractor, tree, experts, centres = self._frozen
        with torch.no_grad():
            embeddings = extractor.embed(degraded).to(self.router.beta)
        routes: Routes = self.router(embeddings)
        if self.training and clean is not None:
            leaves = tree.assign(embeddings.cpu())
            errors = self._errors(degraded, clean, routes)
            return errors, routes, centres[leaves].to(embeddings), leaves.to(embeddings.device)
        with torch.no_grad():
            restored = experts.run(degraded, routes.expert.tolist())
        if not self.training:
            self.seen += torch.bincount(routes.expert.cpu(), minlength=len(self.seen))
            return restored
        own = centres[tree.assign(embeddings.cpu())].to(embeddings)
        return straight_through(restored, routes.gate), routes, own

    @torch.no_grad()
    def _errors(self, degraded: Tensor, clean: Tensor, routes: Routes) -> Tensor:
        found = []
        for level in range(self.router.levels):
            restored = self._frozen.experts.run(degraded, self.router.paths[routes.leaf, level].tolist())
            found.append((restored - clean).abs().mean((1, 2, 3)))
        return torch.stack(found, 1)


class _Frozen(NamedTuple):
    """What does not train; no module registers a tuple's, and an average of the router does without a copy."""

    extractor: Extractor
    tree: ExpertTree
    experts: Experts
    centres: Tensor

    def __deepcopy__(self, memo: Any) -> _Frozen:
        return self


class RouterRun(Run):
    """A run of `mirage.train` in which the router of a tree learns.

    ``train.csv`` has beside the terms of the loss how many of the images went to each level; ``usage.csv``, at each
    validation, to each expert, in training (with its noise) and of the validation pictures (without).

    Args:
        config: of which data, optimizer, schedule, trainer and output count. One process has two or more samples of
            a pass.
        extractor, tree, experts: as of `mirage.unirestorer.UniRestorer`.
        settings: of router and loss.
        fabric: as of `mirage.train.Run`.

    Attributes:
        collapsed: the experts that the last rows of ``usage.csv`` show to be hardly ever used; also printed.

    Raises:
        ConfigError: too small a batch, or crops that the experts cannot take.
        CheckpointError: the folder has the training of a router of another tree.
    """

    def __init__(
        self, config: Config, extractor: Extractor, tree: ExpertTree, experts: Experts,
        settings: RouterSettings | None = None, fabric: Any = None,
    ) -> None:  # fmt: skip
        self.parts = (extractor, tree, experts)
        self.settings = settings or RouterSettings()
        self.collapsed: list[int] = []
        self.used = torch.zeros(len(tree), dtype=torch.int64)
        super().__init__(config, fabric)
        passes = config.trainer.accumulate * self.fabric.world_size
        if config.data.batch // passes < 2:
            raise ConfigError(
                f"data.batch: expected two or more samples a pass, got {config.data.batch} in {passes} passes (of all "
                "processes): the router's heads end in batch normalisation"
            )

    def make_loss(self) -> RouterLoss:
        s = self.settings
        return RouterLoss(s.centre_weight, s.balance_weight or 0.0, s.balance)  # never None here

    def make_network(self) -> nn.Module:
        extractor, tree, experts = self.parts
        if isinstance(extractor, nn.Module):
            extractor.to(self.fabric.device)
        router = Router(tree.paths, tree.centres.shape[1], variance=self.settings.variance)
        return RoutedNetwork(router, extractor, tree, experts)

    @property
    def router(self) -> Router:
        """The router, averaged where the configuration says so; it is the training's own."""
        network: Any = self.network if self.average is None else self.average.module
        return network.router

    def load(self, state: State, path: Path) -> None:
        for name, value in self.network.config.items():  # type: ignore[union-attr, operator]
            if state.arguments.get(name, value) != value:
                raise CheckpointError(f"{path}: is of a router with other {name} than this tree's; name another folder")
        super().load(state, path)

    def _loss(self, degraded: Tensor, clean: Tensor) -> tuple[Tensor, Any]:
        network: Any = self.network
        if self.settings.objective == "expected":
            errors, routes, centres, leaves = self.model(degraded, clean)
            loss, terms = self.loss.expected(errors, leaves, routes, centres, network.router)
        else:
            restored, routes, centres = self.model(degraded)
            loss, terms = self.loss(restored, clean, routes, centres, network.router)
        self.used += torch.bincount(routes.expert.cpu(), minlength=len(self.used))
        levels = torch.bincount(routes.level, minlength=network.router.levels) / len(routes)
        return loss, _Terms({**terms._asdict(), **{f"level_{level}": share for level, share in enumerate(levels)}})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        network: Any = self.network
        network.seen.zero_()
        found = super().validate()
        used = self.used if self.fabric.world_size == 1 else self._summed(self.used)
        rows = {"train": used, "validation": network.seen}
        shares = {
            f"{name}_{expert}": float(count / counts.sum())
            for name, counts in rows.items() if counts.sum()
            for expert, count in enumerate(counts)
        }  # fmt: skip
        if shares:
            self._log("usage", shares)
        self._warn(used)
        self.used.zero_()
        return found

    def _summed(self, counts: Tensor) -> Tensor:
        total = self.fabric.all_reduce(counts.double().to(self.fabric.device), reduce_op="sum")
        return total.round().long().cpu()

    def _warn(self, used: Tensor) -> None:
        tree = self.parts[1]
        self.collapsed = collapsed_experts(used.tolist(), tree)
        if self.collapsed and self._writes:
            tasks = tree.node_tasks()
            names = [f"{i} (level {tree.nodes[i].level}: {' '.join(tasks[i]) or 'no tasks'})" for i in self.collapsed]
            print(
                f"warning    step {self.step}: experts that got less than {COLLAPSED:.0%} of their share since the "
                f"last row of usage.csv: {', '.join(names)}", flush=True,
            )  # fmt: skip


class _Terms(dict):
    def _asdict(self) -> Mapping[str, Any]:
        return self


def collapsed_experts(used: Sequence[int], tree: ExpertTree) -> list[int]:
    """Experts that got less than 1% of their share of the images; those whose share is too small to tell do not count.

    An expert's share is that of its node among the samples of its level (of trees without samples: of its level's
    nodes), divided by the number of levels, since training balances levels.

    Args:
        used: images by expert.
        tree: whose nodes they are of.
    """
    total = sum(used)
    widths = [sum(node.level == level for node in tree.nodes) for level in range(tree.levels)]
    everything = tree.nodes[0].size
    found = []
    for node in tree.nodes:
        share = (node.size / everything if everything else 1 / widths[node.level]) / tree.levels
        if share * total >= ENOUGH and used[node.id] < COLLAPSED * share * total:
            found.append(node.id)
    return found


# --- files


def save_router(router: Router, path: str | os.PathLike[str], settings: RouterSettings | None = None) -> None:
    """Write a router to a ``.safetensors`` file, whole or not at all.

    Raises:
        ValueError: a weight is not finite.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in router.state_dict().items()}
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"router: {name} holds values that are not finite")
    content = {"format": FORMAT, "router": router.config, "training": None if settings is None else asdict(settings)}
    write_whole(path, safetensors_bytes(state, {"format": "pt", "mirage_router": json.dumps(content)}))


def load_router(path: str | os.PathLike[str]) -> Router:
    """A router that `save_router` has written, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no router.
    """
    import safetensors
    import safetensors.torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"no router at {os.fspath(path)!r}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["mirage_router"])
        if content["format"] != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}, got {content['format']!r}")
        router = Router(**content["router"])
        router.load_state_dict(safetensors.torch.load_file(path))
        if not all(math.isfinite(float(value.abs().sum())) for value in router.state_dict().values()):
            raise ValueError("it has weights that are not finite")
    except (KeyError, TypeError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{os.fspath(path)}: not readable as a router: {error}") from error
    return router.eval()
