"""Groups of degradations: ranked by how alike their members are, judged by what sharing a network costs, enumerated.

A group is a ``frozenset`` of degradations' names. What its members lose by sharing a network is `delta_p`; how alike
they are is the mean of the similarities between them, smaller for more alike (`rank_groups`; GRIDS, arXiv 2407.12273,
similarity preprocessing).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "BUCKET",
    "DEGRADATIONS",
    "Group",
    "RankedGroup",
    "Ranking",
    "check_groups",
    "delta_p",
    "enumerate_groupings",
    "group_name",
    "is_feasible",
    "parse_group",
    "rank_groups",
]

DEGRADATIONS = ("GB", "MB", "RL", "SR", "RI", "DB", "JP", "PO", "IN", "GN", "SP")
"""The eleven of GRIDS, in the order of its tables."""

Group = frozenset[str]

BUCKET = 0.05
"""Means of similarities that round to the same multiple of this count as equal."""

TOLERANCE = 1e-9  # dB; losses of published tables have two decimals
LARGEST_SET = 20  # of degradations: a list of groups of ten has 184,756 then
DIGITS = 12  # beyond which means and variances differ by the order of their sums alone
AT_ONCE = 1 << 20  # similarities that are gathered at a time


def delta_p(group: Collection[str], shared: Mapping[str, float] | None, single: Mapping[str, float]) -> float:
    """What sharing costs the member that loses most: the largest ``P(M_S(d), d) - P(M_M(group), d)``, in dB.

    Args:
        group: the degradations.
        shared: P of the group's network by degradation; None, or without one of them: not known.
        single: P of each degradation's own network.

    Returns:
        0 for a group of one; infinity where a value is not known.
    """
    if len(group) == 1:
        return 0.0
    if shared is None or any(d not in shared or d not in single for d in group):
        return math.inf
    return max(single[d] - shared[d] for d in group)


def is_feasible(drop: float, delta: float) -> bool:
    """Whether a loss is within the limit."""
    return drop <= delta + TOLERANCE


def group_name(group: Iterable[str], order: Sequence[str] = ()) -> str:
    """``"GB+MB+RL"``: the members in ``order``, those that are not in it by name after them."""
    places = {name: i for i, name in enumerate(order)}
    return "+".join(sorted(group, key=lambda name: (places.get(name, len(places)), name)))


def parse_group(text: str, known: Collection[str] | None = None) -> Group:
    """The group in ``"GB+MB+RL"``, ``"GB MB RL"`` or ``"GB,MB,RL"``.

    Raises:
        ValueError: it is empty, has a name twice, or one that is not in ``known``.
    """
    names = text.replace("+", " ").replace(",", " ").split()
    if not names or len(set(names)) < len(names):
        raise ValueError(f"group: expected degradations, each once, such as GB+MB+RL, got {text!r}")
    if known is not None:
        check_names(names, known, "group")
    return frozenset(names)


def check_names(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse names that are none of ``known``."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what}: expected some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")


def check_degradations(degradations: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: there are none, one comes twice or is empty, or they are so many that groups cannot be listed.
    """
    if isinstance(degradations, str):
        raise ValueError(f"degradations: expected a sequence of names, got the text {degradations!r}")
    names = tuple(degradations)
    if not names or len(set(names)) < len(names) or not all(names):
        raise ValueError(f"degradations: expected different names, at least one, got {list(names)}")
    odd = [name for name in names if any(letter in "+,/\\" or letter.isspace() for letter in name)]
    if odd:
        raise ValueError(f"degradations: expected names without +, commas, slashes and blanks, got {odd[0]!r}")
    if len(names) > LARGEST_SET:
        raise ValueError(
            f"degradations: expected at most {LARGEST_SET}, since all their groups are listed, got {len(names)}"
        )
    return names


def check_groups(groups: Iterable[Collection[str]], degradations: Sequence[str]) -> None:
    """Refuse groups that are no partition of the degradations.

    Raises:
        ValueError: a degradation is in no group or in several, or a group has one that is not among them.
    """
    members = [name for group in groups for name in group]
    check_names(members, degradations, "groups")
    wrong = {name: members.count(name) for name in degradations if members.count(name) != 1}
    if wrong:
        found = ", ".join(f"{name} in {count}" for name, count in wrong.items())
        raise ValueError(f"groups: expected each degradation in one group, got {found}")


@dataclass(frozen=True)
class RankedGroup:
    """A group with the population mean and variance of the similarities between its members, over ordered pairs."""

    members: tuple[str, ...]
    mean: float
    variance: float

    @property
    def group(self) -> Group:
        return frozenset(self.members)


class Ranking:
    """The groups of each size, most alike first; lists are made when they are first asked for.

    Args:
        degradations: the names, in the order of rows and columns.
        matrix: similarities, ``[n, n]``, smaller for more alike; its diagonal does not count.
        bucket: means that round to the same multiple of it count as equal, and are ordered by variance, then by the
            members' places; 0: means count as they are.

    Raises:
        ValueError: the matrix is of another size or has values that are not finite, or the bucket is negative.
    """

    def __init__(self, degradations: Sequence[str], matrix: Any, bucket: float = BUCKET) -> None:
        self.degradations = check_degradations(degradations)
        n = len(self.degradations)
        self.matrix = np.array(matrix, np.float64)
        if self.matrix.shape != (n, n):
            shape = list(self.matrix.shape)
            raise ValueError(f"matrix: expected [{n}, {n}], a row and a column a degradation, got {shape}")
        np.fill_diagonal(self.matrix, 0.0)
        if not np.isfinite(self.matrix).all():
            row, column = np.argwhere(~np.isfinite(self.matrix))[0]
            names = f"{self.degradations[row]}, {self.degradations[column]}"
            raise ValueError(f"matrix: expected finite numbers, got {self.matrix[row, column]} at {names}")
        if not (bucket >= 0 and math.isfinite(bucket)):
            raise ValueError(f"bucket: expected 0 or a positive number, got {bucket}")
        self.bucket = bucket
        self._lists: dict[int, tuple[RankedGroup, ...]] = {}

    def of_size(self, size: int) -> tuple[RankedGroup, ...]:
        """``Lambda_size``: the groups of so many degradations, in order.

        Raises:
            ValueError: ``size`` is not from 1 to the number of degradations.
        """
        if size not in self._lists:
            self._lists[size] = self._of_size(size)
        return self._lists[size]

    def _of_size(self, size: int) -> tuple[RankedGroup, ...]:
        n = len(self.degradations)
        if not 1 <= size <= n:
            raise ValueError(f"size: expected 1 to {n}, got {size}")
        places = np.array(list(itertools.combinations(range(n), size)), np.int64)
        mean, variance = self._moments(places)
        rank = np.rint(mean / self.bucket) if self.bucket else mean
        order = np.lexsort((*places.T[::-1], variance, rank))
        names = np.array(self.degradations, object)
        return tuple(RankedGroup(tuple(names[places[i]]), float(mean[i]), float(variance[i])) for i in order)

    def _moments(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of each row's pairs; ``[groups]`` each."""
        groups, size = places.shape
        pairs = list(itertools.permutations(range(size), 2))
        if not pairs:
            return np.zeros(groups), np.zeros(groups)
        first, second = np.array(pairs).T
        step = max(1, AT_ONCE // len(pairs))
        parts = [places[i : i + step] for i in range(0, groups, step)]
        values = (self.matrix[part[:, first], part[:, second]] for part in parts)
        moments = [(each.mean(1), each.var(1)) for each in values]
        mean, variance = (np.concatenate([m[i] for m in moments]).round(DIGITS) for i in (0, 1))
        return mean, variance

    def find(self, group: Collection[str]) -> RankedGroup:
        """The entry of a group.

        Raises:
            ValueError: it has a name that is none of the degradations.
        """
        check_names(group, self.degradations, "group")
        return next(each for each in self.of_size(len(group)) if each.group == frozenset(group))


def rank_groups(
    degradations: Sequence[str], matrix: Any, *, bucket: float = BUCKET, symmetric: bool = False
) -> Ranking:
    """Rank all groups of degradations by how alike their members are.

    Args:
        degradations: names, in the order of the matrix.
        matrix: similarities, ``[n, n]``, such as `mirage.grids.similarity_matrix` gives; smaller is more alike.
        bucket: see `Ranking`.
        symmetric: take the mean of the matrix and its transpose. Means of groups are the same, variances are smaller.

    Raises:
        ValueError: as `Ranking`.
    """
    values = np.array(matrix, np.float64)
    if symmetric and values.ndim == 2 and values.shape[0] == values.shape[1]:
        values = (values + values.T) / 2
    return Ranking(degradations, values, bucket)


def enumerate_groupings(
    groups: Iterable[Collection[str]], degradations: Sequence[str] = DEGRADATIONS, count: int | None = None
) -> Iterator[tuple[Group, ...]]:
    """All partitions of the degradations into some of the groups: brute force.

    Args:
        groups: that may be used, such as the feasible ones; groups of one count only where they are listed.
        degradations: what is to be divided.
        count: partitions into exactly so many groups; None: all.

    Yields:
        Each partition once, as its groups in the order of their first members.

    Raises:
        ValueError: a group has a name that is none of the degradations.
    """
    names = check_degradations(degradations)
    given = dict.fromkeys(frozenset(group) for group in groups if group)
    for group in given:
        check_names(group, names, "groups")
    starting: dict[str, list[Group]] = {name: [] for name in names}
    for group in given:
        starting[next(name for name in names if name in group)].append(group)

    def divide(left: frozenset[str], chosen: tuple[Group, ...]) -> Iterator[tuple[Group, ...]]:
        if not left:
            if count is None or len(chosen) == count:
                yield chosen
            return
        if count is not None and len(chosen) >= count:
            return
        first = next(name for name in names if name in left)
        for group in starting[first]:
            if group <= left:
                yield from divide(left - group, (*chosen, group))

    return divide(frozenset(names), ())
