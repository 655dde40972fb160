"""`UniRestorer`: extractor, tree, router and experts together; each image is restored by exactly one expert."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirage.restore.pixels import Reader, as_image
from mirage.unirestorer.confidence import check_confidence, finest_level, path_shares
from mirage.unirestorer.dispatcher import Experts, dispatch
from mirage.unirestorer.router import Router, Routes
from mirage.unirestorer.tree import ExpertTree

if TYPE_CHECKING:
    from mirage.unirestorer.extractors import Extractor
    from mirage.unirestorer.routed_files import RoutedOutcome

__all__ = ["Explanation", "RestoredImage", "UniRestorer"]

Images = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Explanation:
    """Why an image went to an expert.

    Attributes:
        leaf: number of the leaf, from 0.
        level: 0 is the root.
        expert: number of the expert, and of its node of the tree.
        tasks: those of the node, the most frequent first.
        p_leaf, p_level: the router's probabilities of all leaves and levels. Where the system has a ``confidence``,
            ``level`` follows from those of the leaves, and need not be the likeliest of ``p_level``.
        uncertainty: mean variance that the router expects of the embedding around the leaf's centre; comparable between
            images of one router.
    """

    leaf: int
    level: int
    expert: int
    tasks: tuple[str, ...]
    p_leaf: tuple[float, ...]
    p_level: tuple[float, ...]
    uncertainty: float


class RestoredImage(NamedTuple):
    """A restored image, and why that expert did it."""

    image: np.ndarray
    explanation: Explanation


class UniRestorer:
    """Restores images of any degradation, each with the expert of one node of a tree.

    Args:
        extractor: what makes an embedding of an image.
        tree: of the clusters.
        router: of the tree's paths; is put into evaluation mode.
        experts: by the numbers of the tree's nodes.
        confidence: None: the level is the router's choice. A number c in (0, 1]: it is that of the finest node on the
            path of the router's leaf whose leaves have at least c of the probability together, so that an image whose
            leaf is in doubt goes to a coarser one; the root has all of it. An attribute, which may be set.

    Raises:
        ValueError: router, tree and experts are not of each other, or ``confidence`` is out of its range.

    Calls from several threads at once are safe.
    """

    def __init__(
        self, extractor: Extractor, tree: ExpertTree, router: Router, experts: Experts, *,
        confidence: float | None = None,
    ) -> None:  # fmt: skip
        if not torch.equal(router.paths.cpu(), tree.paths):
            raise ValueError(
                f"router: expected one of the tree's paths, {list(tree.paths.shape)} of {len(tree)} nodes, got one of "
                f"{list(router.paths.shape)} of {router.experts} or of other paths"
            )
        if len(experts) != len(tree):
            raise ValueError(f"experts: expected one for each of the tree's {len(tree)} nodes, got {len(experts)}")
        self.extractor, self.tree, self.router, self.experts = extractor, tree, router.eval(), experts
        self.confidence = confidence
        self.node_tasks = tree.node_tasks()
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"UniRestorer({self.tree!r}, tasks: {', '.join(self.tree.tasks) or 'not known'})"

    @property
    def confidence(self) -> float | None:
        """Of the leaves' probability, how much the expert's leaves have together; None: the router says the level."""
        return self._confidence

    @confidence.setter
    def confidence(self, confidence: float | None) -> None:
        self._confidence = check_confidence(confidence)

    # --- routing

    @torch.no_grad()
    def route(self, images: Images, task: str | Sequence[str | None] | None = None) -> Routes:
        """Which expert each image goes to; none runs.

        Args:
            images: ``[B, 3, H, W]``, or a list of ``[3, H, W]`` of any sizes; floating point in [0, 1].
            task: a task of the tree, whose leaves alone can be chosen then, and whose probabilities alone count for
                ``confidence``; a level that is the router's choice is as without a task, and the root stays. A list
                has a task or None for each image. None: all leaves.

        Raises:
            ValueError: an unknown task (the message lists those that are known), or images of another shape.
        """
        chosen = _as_list(images)
        if not chosen:
            raise ValueError("images: expected at least one, got none")
        mask = self._mask(task, len(chosen))
        with self._lock:
            weight = self.router.beta
            embeddings = self.embed(chosen).to(weight.device, weight.dtype)
            routes, confidence = self.router(embeddings, mask), self.confidence
        if confidence is None:
            return routes
        paths = self.router.paths
        level = finest_level(path_shares(routes.p_leaf, routes.leaf, paths), confidence)
        return dataclasses.replace(routes, level=level, expert=paths[routes.leaf, level])

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Embeddings, ``[B, dim]``; images of one size go through the extractor together."""
        chosen = _as_list(images)
        found: dict[int, Tensor] = {}
        for own in _by_size(chosen):
            embeddings = self.extractor.embed(torch.stack([chosen[i] for i in own]))
            found.update(zip(own, embeddings, strict=True))
        return torch.stack([found[i] for i in range(len(chosen))])

    def _mask(self, task: str | Sequence[str | None] | None, count: int) -> Tensor | None:
        if task is None:
            return None
        names = [task] * count if isinstance(task, str) else list(task)
        if len(names) != count:
            raise ValueError(f"task: expected one for each of {count} images, got {len(names)}")
        every = torch.ones(self.router.leaves, dtype=torch.bool)
        return torch.stack([every if name is None else self.tree.leaf_mask(name) for name in names])

    def explain(self, routes: Routes) -> list[Explanation]:
        """What routes say of each image, in plain numbers."""
        with torch.no_grad():
            variances = self.router.log_variance(routes.uncertainty).exp().mean(1).tolist()
        return [
            Explanation(leaf, level, expert, self.node_tasks[expert], tuple(p_leaf), tuple(p_level), variance)
            for leaf, level, expert, p_leaf, p_level, variance in zip(
                routes.leaf.tolist(), routes.level.tolist(), routes.expert.tolist(), routes.p_leaf.tolist(),
                routes.p_level.tolist(), variances, strict=True,
            )
        ]  # fmt: skip

    # --- restoring tensors

    @torch.no_grad()
    def __call__(self, images: Images, task: str | Sequence[str | None] | None = None, *, explain: bool = False) -> Any:
        """Restore images; each expert that is needed runs once for all images of one size.

        Args:
            images, task: as of `route`.
            explain: return an `Explanation` of each image, too.

        Returns:
            The restored images, a tensor or a list as ``images`` is, and with ``explain`` the list of explanations.
        """
        chosen = _as_list(images)
        with self._lock:
            routes = self.route(chosen, task)
            restored: Any = dispatch(self.experts, chosen, routes.expert.tolist())
        if isinstance(images, Tensor):
            restored = torch.stack(restored)
        return (restored, self.explain(routes)) if explain else restored

    # --- restoring arrays and files

    def select(self, image: np.ndarray, task: str | None = None) -> Explanation:
        """The expert of an image as `restore` takes it; none runs."""
        return self.explain(self.route([self._tensor(as_image(image))], task))[0]

    def restore(
        self, image: np.ndarray, task: str | None = None, *, explanation: Explanation | None = None, **options: Any
    ) -> RestoredImage:
        """Restore an image.

        Args:
            image: as `mirage.Restorer` takes it; alpha does not count.
            task: as of `route`.
            explanation: from `select`, where that is known.
            options: arguments of `mirage.Restorer` for this image, such as ``tile``, ``memory`` or ``attention``.

        Raises:
            TypeError, ValueError: as `route` and `mirage.Restorer`.
        """
        import mirage

        chosen = self.select(image, task) if explanation is None else explanation
        with self._lock, self.experts.network(chosen.expert) as network:
            return RestoredImage(mirage.Restorer(network, **options)(image), chosen)

    def _tensor(self, pixels: np.ndarray) -> Tensor:
        """``[3, H, W]``, float32 in [0, 1]; hidden colours are made up, as of `mirage.Restorer`."""
        reader = Reader(pixels, 1)
        return reader.read(0, reader.height).contiguous().to(self.router.beta.device)

    def files(
        self,
        inputs: str | Path | Iterable[str | Path],
        out_dir: str | Path,
        *,
        task: str | None = None,
        overwrite: bool = False,
        on_skip: Callable[[Path, str], None] | None = None,
        **options: Any,
    ) -> Iterator[RoutedOutcome]:
        """Restore files, and all images of folders, into a folder; ``experts.jsonl`` and ``experts.csv`` there tell
        each file's leaf, level, expert, probabilities and uncertainty. Needs the extra ``images``.

        A run that was stopped goes on where it was, as of `mirage.Restorer.files`; a folder with results of another
        system, task or ``confidence`` is refused.

        Args:
            inputs, out_dir, on_skip: as there.
            task: as of `route`.
            overwrite: restore again what is finished, also where it is of another system.
            options: ``format``, ``quality``, ``max_pixels``, as there, and those of `restore`.

        Raises:
            ValueError: the folder has other results, or the task is unknown.
        """
        from mirage.unirestorer.routed_files import restore_routed

        self._mask(task, 1)
        given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
        return restore_routed(self, map(Path, given), Path(out_dir), task, overwrite, on_skip, options)

    # --- on disk

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what decides where images go: the tree, and the router's weights. (Experts and
        extractor are not read for it, and ``confidence`` is no part of it.)"""
        import hashlib

        digest = hashlib.sha256(self.tree.fingerprint.encode())
        for name, value in sorted(self.router.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> UniRestorer:
        """What the commands of ``mirage unirestorer``, or `mirage.unirestorer.SystemFolder.save`, have written.

        Args:
            folder: the folder.
            options: of `mirage.unirestorer.SystemFolder.system`: ``device``, ``memory``, ``extractor``,
                ``confidence``.

        Raises:
            FileNotFoundError: a part is missing; the message says which.
            ValueError: a part is damaged, or they are not of each other.
        """
        from mirage.unirestorer.folder import SystemFolder

        return SystemFolder(folder).system(**options)


def _as_list(images: Images) -> list[Tensor]:
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ValueError(f"images: expected [B, 3, H, W] or a list of [3, H, W], got {list(images.shape)}")
    chosen = list(images)
    for image in chosen:
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel() or not image.is_floating_point():
            raise ValueError(f"images: expected floating-point [3, H, W], got {image.dtype} {list(image.shape)}")
    return chosen


def _by_size(images: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    return list(groups.values())
