"""The tree of clusters of degradations: one expert for each node, coarse at the root, fine at the leaves.

UniRestorer, arXiv 2412.20157, stage 2: level 0 is one group of everything; each group is divided by k-means on the
embeddings of its members, to the last level.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage.unirestorer.clustering import divide, nearest, parse_children

__all__ = ["RELEASED_CHILDREN", "ExpertTree", "Node"]

RELEASED_CHILDREN = ((7,), (3, 3, 3, 7, 2, 2, 2))
"""Children of each group in the tree {1, 7, 22} of the authors' checkpoint, for `ExpertTree.from_children`."""

FRACTION = 0.05


@dataclass(frozen=True, eq=False)
class Node:
    """A group of samples.

    Attributes:
        id: its place among all nodes, and of its expert: 0 for the root, then level by level.
        level: 0 for the root.
        parent: the id of the node that it is a part of; None for the root.
        centre: mean of its members' embeddings, float64 ``[D]``; None where embeddings are not known.
        members: indices of its samples, ascending, int64 ``[size]``.
        tasks: how many members belong to each task.
    """

    id: int
    level: int
    parent: int | None
    centre: Tensor | None = None
    members: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    tasks: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.members)


class ExpertTree:
    """Nodes of levels 0 to T - 1, every leaf on the last one.

    Args:
        nodes: by id: level by level; the children of a node may stand anywhere in their level.
        normalize: whether embeddings are divided by their Euclidean norm before they are compared with centres.

    Raises:
        ValueError: ids or levels are out of order, a parent is not of the level above, a node above the last level has
            no child, only some nodes have centres, or children do not divide their parent's members.
    """

    def __init__(self, nodes: Iterable[Node], *, normalize: bool = False) -> None:
        self.nodes = tuple(nodes)
        self.normalize = normalize
        self._children: dict[int, list[int]] = {node.id: [] for node in self.nodes}
        _check_order(self.nodes)
        for node in self.nodes[1:]:
            self._children[node.parent or 0].append(node.id)
        self.leaves = tuple(node.id for node in self.nodes if node.level == self.levels - 1)
        """Ids of the nodes of the last level; leaf number k is its place here."""
        _check_parts(self.nodes, self._children, self.levels)

    @property
    def levels(self) -> int:
        """T, the number of levels."""
        return self.nodes[-1].level + 1

    @property
    def paths(self) -> Tensor:
        """Ids from the root to each leaf, int64 ``[K, T]``."""
        rows = []
        for leaf in self.leaves:
            row = [leaf]
            while (parent := self.nodes[row[0]].parent) is not None:
                row.insert(0, parent)
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int64)

    @property
    def centres(self) -> Tensor:
        """Of all nodes, float64 ``[nodes, D]``; of the leaves: ``tree.centres[list(tree.leaves)]``.

        Raises:
            ValueError: the tree was made without embeddings.
        """
        found = [node.centre for node in self.nodes if node.centre is not None]
        if not found:
            raise ValueError("tree: expected one with centres, got one that was made without embeddings")
        return torch.stack(found)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        counts = Counter(node.level for node in self.nodes)
        return f"ExpertTree({{{', '.join(str(counts[level]) for level in range(self.levels))}}})"

    def children(self, node: int) -> tuple[int, ...]:
        """Ids of a node's children, in order."""
        return tuple(self._children[node])

    # --- tasks

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks of all members, in alphabetical order."""
        return tuple(sorted(self.nodes[0].tasks))

    def node_tasks(self, fraction: float = FRACTION) -> tuple[tuple[str, ...], ...]:
        """Of each node, the tasks that at least ``fraction`` of its members belong to, most frequent first."""
        found = []
        for node in self.nodes:
            ordered = sorted(node.tasks.items(), key=lambda item: (-item[1], item[0]))
            found.append(tuple(name for name, count in ordered if count and count >= fraction * node.size))
        return tuple(found)

    def leaf_mask(self, task: str, fraction: float = FRACTION) -> Tensor:
        """Which leaves stay when the user names a task: those that have it (`node_tasks`); bool ``[K]``.

        Where every leaf holds less of it than ``fraction``, the leaf with most of its samples stays.

        Raises:
            ValueError: no member belongs to this task; the message lists those that there are.
        """
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none: the tree was made without tasks"
            raise ValueError(f"task: expected one of {known}; got {task!r}")
        has = self.node_tasks(fraction)
        mask = torch.tensor([task in has[leaf] for leaf in self.leaves])
        if not mask.any():
            mask[max(range(len(mask)), key=lambda k: self.nodes[self.leaves[k]].tasks.get(task, 0))] = True
        return mask

    # --- samples

    def assign(self, embeddings: Tensor | np.ndarray) -> Tensor:
        """The leaf that each embedding belongs to: at each level, the child whose centre is nearest.

        Args:
            embeddings: ``[N, D]``.

        Returns:
            Numbers of leaves, int64 ``[N]`` on the CPU; ``tree.paths[numbers]`` are the nodes.

        Raises:
            ValueError: the embeddings have another shape or values that are not finite, or the tree has no centres.
        """
        centres = self.centres.numpy()
        points = _points(embeddings, self.normalize, centres.shape[1])
        here = np.zeros(len(points), np.int64)
        for _ in range(1, self.levels):
            below = here.copy()
            for node in np.unique(here):
                inside = np.flatnonzero(here == node)
                children = np.array(self._children[int(node)])
                below[inside] = children[nearest(points[inside], centres[children])[0]]
            here = below
        return torch.from_numpy(here - self.leaves[0])

    @classmethod
    def fit(
        cls, embeddings: Tensor | np.ndarray, children: Any, tasks: Sequence[str] | None = None, *, seed: int = 0,
        min_samples: int = 2, normalize: bool = False,
    ) -> ExpertTree:  # fmt: skip
        """Divide samples by hierarchical k-means; see `mirage.unirestorer.clustering.kmeans`.

        Args:
            embeddings: ``[N, D]``, clustered in float64.
            children: for each level below the root, how many children its groups get: an int (each group), a list (of
                each), or ``"auto:K"``: K nodes in all, one child a group first, and more to the groups whose inertia
                falls most. ``[4, "auto:8"]`` makes levels of 1, 4 and 8 nodes, ``[7, [3, 3, 3, 7, 2, 2, 2]]`` those
                of 1, 7 and 22, ``[]`` the root alone. Children stand by size, largest first, then by their centres.
            tasks: a name for each sample, counted in each node; None: not known.
            seed: decides the tree.
            min_samples: groups of fewer members, and those whose embeddings are all equal, are not divided: they have
                one child, with their members and centre.
            normalize: divide embeddings by their Euclidean norm first, here and in `assign`.

        Raises:
            ValueError: an argument has another shape or value.
            ModuleNotFoundError: scikit-learn is not installed (the extra ``unirestorer``).
        """
        points = _points(embeddings, normalize)
        if not len(points):
            raise ValueError("embeddings: expected at least one sample, got none")
        if tasks is not None and len(tasks) != len(points):
            raise ValueError(f"tasks: expected a name for each of {len(points)} samples, got {len(tasks)}")
        if min_samples < 1:
            raise ValueError(f"min_samples: expected at least 1, got {min_samples}")
        names = None if tasks is None else np.array([str(task) for task in tasks], object)
        nodes: list[Node] = []
        parents: list[int | None] = [None]
        groups = [np.arange(len(points))]
        plan = parse_children(children)
        for level in range(len(plan) + 1):
            first = len(nodes)
            for parent, members in zip(parents, groups, strict=True):
                counts = {} if names is None else dict(sorted(Counter(names[members]).items()))
                centre = torch.from_numpy(points[members].mean(0))
                nodes.append(Node(len(nodes), level, parent, centre, torch.from_numpy(members), counts))
            if level < len(plan):
                entropy = int(np.random.SeedSequence([seed, level]).generate_state(1)[0])
                parts = divide(points, groups, plan[level], seed=entropy, min_samples=min_samples)
                parents = [first + place for place, own in enumerate(parts) for _ in own]
                groups = [members for own in parts for members in own]
        return cls(nodes, normalize=normalize)

    # --- trees without samples

    @classmethod
    def from_paths(cls, paths: Tensor | Sequence[Sequence[int]]) -> ExpertTree:
        """The tree of a table of ids from the root to each leaf, ``[K, T]``; without centres, members and tasks.

        Raises:
            ValueError: it is no such table, a node has two parents, or leaves do not ascend.
        """
        table = torch.as_tensor(paths)
        if table.ndim != 2 or not table.numel() or table.is_floating_point():
            raise ValueError(f"paths: expected integers [leaves, levels], got {table.dtype} {list(table.shape)}")
        found: dict[int, tuple[int, int | None]] = {}
        for row in table.tolist():
            for level, node in enumerate(row):
                place = level, row[level - 1] if level else None
                if found.setdefault(node, place) != place:
                    raise ValueError(f"paths: expected each node on one level below one parent, got node {node} twice")
        if table[:, -1].tolist() != sorted(set(table[:, -1].tolist())):
            raise ValueError(f"paths: expected leaves in ascending order, got {table[:, -1].tolist()}")
        return cls(Node(node, *found[node]) for node in sorted(found))

    @classmethod
    def from_children(cls, counts: Sequence[Sequence[int]]) -> ExpertTree:
        """The tree whose nodes have so many children, a list for each level above the last.

        ``ExpertTree.from_children(RELEASED_CHILDREN)`` is the tree of the authors' checkpoint.
        """
        nodes = [Node(0, 0, None)]
        for level, row in enumerate(counts):
            above = [node.id for node in nodes if node.level == level]
            if len(row) != len(above):
                raise ValueError(f"counts: expected {len(above)} numbers for level {level}, got {len(row)}")
            for parent, count in zip(above, row, strict=True):
                nodes += [Node(len(nodes) + place, level + 1, parent) for place in range(count)]
        return cls(nodes)

    # --- files

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of structure, members, tasks and centres."""
        from mirage.unirestorer.tree_files import pack

        structure, tensors = pack(self)
        return hashlib.sha256(json.dumps(structure, sort_keys=True).encode() + tensors).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write ``path``, JSON with what people read, and beside it the tensors, as ``.safetensors``.

        Raises:
            ValueError: ``path`` does not end in ``.json``.
            OSError: a file cannot be written.
        """
        from mirage.unirestorer.tree_files import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> ExpertTree:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: they are no tree, of another version, or do not belong together.
        """
        from mirage.unirestorer.tree_files import load

        return load(Path(path))


def _points(embeddings: Tensor | np.ndarray, normalize: bool, dim: int | None = None) -> np.ndarray:
    """Embeddings as contiguous float64 ``[N, D]``, divided by their norm where that is asked for."""
    points = torch.as_tensor(embeddings).detach().to("cpu", torch.float64).contiguous()
    if points.ndim != 2 or points.shape[1] != (dim or points.shape[1]):
        raise ValueError(f"embeddings: expected [N, {dim or 'D'}], got {list(points.shape)}")
    if not points.isfinite().all():
        row = int((~points.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"embeddings: expected finite numbers, got others in row {row}")
    return (torch.nn.functional.normalize(points) if normalize else points).numpy()


def _check_order(nodes: Sequence[Node]) -> None:
    if not nodes or nodes[0].level or nodes[0].parent is not None:
        raise ValueError(f"nodes: expected a root first, of level 0 and without parent, got {nodes[:1]}")
    for place, node in enumerate(nodes):
        if node.id != place:
            raise ValueError(f"nodes: expected ids 0, 1, 2, ... in order, got {node.id} at place {place}")
        if not place:
            continue
        if node.parent is None or not 0 <= node.parent < place or nodes[node.parent].level != node.level - 1:
            raise ValueError(f"nodes: expected a parent of level {node.level - 1} for node {place}, got {node.parent}")
        if node.level < nodes[place - 1].level:
            raise ValueError(f"nodes: expected them level by level, got level {node.level} at place {place}")


def _check_parts(nodes: Sequence[Node], children: Mapping[int, Sequence[int]], levels: int) -> None:
    if len({None if node.centre is None else len(node.centre) for node in nodes}) > 1:
        raise ValueError("nodes: expected centres of one size in all of them or in none")
    for node in nodes:
        if bool((node.members[1:] <= node.members[:-1]).any()):
            raise ValueError(f"nodes: expected members in ascending order, each once, in node {node.id}")
        if node.level == levels - 1:
            continue
        if not children[node.id]:
            raise ValueError(f"nodes: expected children of node {node.id}, since it is above the last level; got none")
        parts = torch.cat([nodes[child].members for child in children[node.id]]).sort().values
        if not torch.equal(parts, node.members):
            raise ValueError(f"nodes: expected the members of node {node.id}, each in one of its children")
