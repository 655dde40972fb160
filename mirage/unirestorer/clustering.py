"""Hierarchical k-means: groups of samples divided level by level (UniRestorer, arXiv 2412.20157, stage 2).

The paper leaves open how many children a group gets, and the details of k-means; `parse_children` says what can be
asked for, and `kmeans` what is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Auto", "Children", "divide", "kmeans", "nearest", "parse_children"]

RESTARTS, ITERATIONS, TOLERANCE = 10, 300, 1e-4
SETTLING = 1000  # rounds of assignments and means behind k-means; a handful are needed


@dataclass(frozen=True)
class Auto:
    """A level of ``total`` nodes: one child a group first; then the group whose k-means inertia falls most gets one
    more, until there are so many.
    """

    total: int

    def __str__(self) -> str:
        return f"auto:{self.total}"


Children = int | tuple[int, ...] | Auto
"""Children of every group of a level, of each group of it, or as many as reach a total."""


def parse_children(children: Any) -> tuple[Children, ...]:
    """What to divide into, a level below the root each.

    Args:
        children: for each level an int (children of every group), a list of ints (children of each group of the level
            above, in its order), an `Auto` or ``"auto:8"`` (so many nodes in all). One level alone needs no list; of
            the text ``"7 3+3+3+7+2+2+2"`` or ``"4 auto:8"`` each word is a level. Nothing: the root alone.

    Raises:
        ValueError: a level is none of these, or a number is below 1.
    """
    if isinstance(children, str):
        children = children.replace(",", " ").split()
    elif isinstance(children, int | Auto):
        children = [children]
    return tuple(_parse_level(level) for level in children)


def _parse_level(given: Any) -> Children:
    expected = "children: expected an int, ints of each group such as 3+2, or auto:N for each level"
    try:
        level: Any = _read_level(given) if isinstance(given, str) else given
        if isinstance(level, Auto):
            found: Children = level
            least = level.total
        elif isinstance(level, int | np.integer) and not isinstance(level, bool):
            found = least = int(level)
        else:
            found = tuple(int(count) for count in level)
            least = min(found)
    except (TypeError, ValueError):
        raise ValueError(f"{expected}; got {given!r}") from None
    if least < 1:
        raise ValueError(f"{expected}, at least 1; got {given!r}")
    return found


def _read_level(text: str) -> Children:
    head, colon, total = text.partition(":")
    if colon and head == "auto":
        return Auto(int(total))
    numbers = tuple(int(word) for word in text.split("+"))
    return numbers if len(numbers) > 1 else numbers[0]


def nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each point, the first of equals, and how far it is; the same in whatever batch points come.

    Args:
        points: float64 ``[N, D]``.
        centres: float64 ``[K, D]``.

    Returns:
        int64 ``[N]``, and Euclidean distances, float64 ``[N]``.
    """
    mode = "donot_use_mm_for_euclid_dist"  # products would round each pair by its neighbours, and cancel
    distances = torch.cdist(torch.from_numpy(points), torch.from_numpy(centres), compute_mode=mode).numpy()
    places = distances.argmin(1)
    return places, distances[np.arange(len(points)), places]


def kmeans(points: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Places of the points of each cluster, ascending; clusters by size, largest first, then by their centres.

    scikit-learn's ``KMeans`` in float64: squared Euclidean distance, k-means++, 10 restarts, 300 iterations, tolerance
    1e-4. Assignments and means are then repeated until nothing changes, so that a cluster's centre is the mean of its
    points, and each point's nearest centre is that of its cluster. A cluster that is empty starts again at the point
    that is farthest from its centre. One thread: the order of sums, and so the result, does not depend on the machine.

    Args:
        points: float64 ``[N, D]``.
        count: of clusters; where fewer points differ, there are fewer.
        seed: of the random numbers.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed (the extra ``unirestorer``).
    """
    count = min(count, len(points))
    if count == 1:
        return [np.arange(len(points))]
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    settings: Any = {"n_init": RESTARTS, "max_iter": ITERATIONS, "tol": TOLERANCE}
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer points differ than clusters are asked for
        labels = KMeans(count, init="k-means++", algorithm="lloyd", random_state=seed, **settings).fit(points).labels_
    return _settled(points, np.asarray(labels, np.int64), count)


def _settled(points: np.ndarray, labels: np.ndarray, count: int) -> list[np.ndarray]:
    clusters: list[np.ndarray] = []
    for _ in range(SETTLING):
        clusters = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        clusters.sort(key=lambda cluster: (-len(cluster), *points[cluster].mean(0)))
        ordered = np.empty(len(points), np.int64)
        for place, cluster in enumerate(clusters):
            ordered[cluster] = place
        labels, distance = nearest(points, np.stack([points[cluster].mean(0) for cluster in clusters]))
        farthest = int(distance.argmax())
        if len(np.unique(labels)) < count and distance[farthest] > 0:
            labels[farthest] = labels.max() + 1  # an empty cluster starts again
        if np.array_equal(labels, ordered):
            break
    return clusters


def inertia(points: np.ndarray, clusters: Sequence[np.ndarray]) -> float:
    """The sum of squared distances to the clusters' means."""
    return float(sum(((points[cluster] - points[cluster].mean(0)) ** 2).sum() for cluster in clusters))


def divide(
    points: np.ndarray, groups: Sequence[np.ndarray], children: Children, *, seed: int, min_samples: int
) -> list[list[np.ndarray]]:
    """The members of each group's children.

    Args:
        points: all embeddings, float64 ``[N, D]``.
        groups: indices of the members of each group of a level.
        children: see `Children`.
        seed: with the place of a group, decides the random numbers of its k-means.
        min_samples: groups of fewer members are not divided: they have one child, of the same members.

    Raises:
        ValueError: ``children`` names another number of groups, or fewer nodes in all than there are groups.
    """
    seeds = [int(np.random.SeedSequence([seed, place]).generate_state(1)[0]) for place in range(len(groups))]

    def split(place: int, count: int) -> list[np.ndarray]:
        members = groups[place]
        if count == 1 or len(members) < min_samples:
            return [members]
        return [members[cluster] for cluster in kmeans(points[members], count, seeds[place])]

    if isinstance(children, Auto):
        return _divide_to(points, len(groups), children.total, split)
    counts = [children] * len(groups) if isinstance(children, int) else list(children)
    if len(counts) != len(groups):
        raise ValueError(f"children: expected a number for each of {len(groups)} groups, got {len(counts)}: {counts}")
    return [split(place, count) for place, count in enumerate(counts)]


def _divide_to(points: np.ndarray, groups: int, total: int, split: Any) -> list[list[np.ndarray]]:
    """Children of ``groups`` groups, ``total`` in all, or fewer where no group can be divided further."""
    if total < groups:
        raise ValueError(f"children: expected at least as many nodes as the {groups} of the level above, got {total}")
    here = [split(place, 1) for place in range(groups)]
    ahead: dict[int, tuple[float, list[np.ndarray]]] = {}
    while sum(map(len, here)) < total:
        for place, parts in enumerate(here):
            if place not in ahead:
                more = split(place, len(parts) + 1)
                falls = inertia(points, parts) - inertia(points, more) if len(more) > len(parts) else -np.inf
                ahead[place] = falls, more
        best = max(ahead, key=lambda place: ahead[place][0])  # the first of equals
        if ahead[best][0] == -np.inf:
            break
        here[best] = ahead.pop(best)[1]
    return here
