"""The fewest groups of degradations that can share networks: similarity preprocessing and Algorithm 1 of GRIDS.

`search_groups` bisects over the size of groups and over places in the ranking, with few trainings, for the groups worth
considering; then over the number of groups, for the smallest number of them that covers all degradations.

The algorithm as printed (arXiv 2407.12273) runs its inner loop over the wrong list, drops solutions found by recursive
calls, and forgets the best one while bisecting; here it is what the text describes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mirage.grids.groups import (
    Group,
    Ranking,
    check_degradations,
    check_groups,
    delta_p,
    group_name,
    is_feasible,
)
from mirage.grids.performance import Performance
from mirage.whole_files import write_whole

__all__ = ["DELTA", "GroupSearch", "Grouping", "Step", "load_grouping", "search_groups"]

DELTA = 0.7
"""dB that a degradation may lose by sharing a network: GRIDS's limit for Restormer."""

FORMAT = "mirage grouping, version 1"


@dataclass(frozen=True)
class Step:
    """One question of a search, and its answer.

    Attributes:
        stage: ``"size"``: is the most alike group of so many members feasible; ``"rank"``: is the group at this place
            of the list of its size; ``"cover"``: is there a solution with so many groups; ``"verify"``: is a group of a
            solution feasible.
        number: members of the group; of ``"cover"`` and ``"verify"``, groups of the solution at most.
        passed: the answer.
        group: name of the group that was looked at; empty for ``"cover"``.
        place: in the list of its size, from 1; 0 where there is none.
        drop: what the group costs, in dB; infinite where it is not known.
        trained: a network was trained for the answer.
    """

    stage: str
    number: int
    passed: bool
    group: str = ""
    place: int = 0
    drop: float = math.nan
    trained: bool = False


@dataclass(frozen=True)
class Grouping:
    """What a search found.

    Attributes:
        degradations: what is divided.
        delta: the limit, in dB.
        groups: the answer: each degradation in one, in the order of the search.
        drops: what each of them costs its worst member, in dB, by the group's name.
        trace: the search, question by question.
        trainings: networks trained for this search: ``"single"`` (one degradation each), ``"prepare"`` (the
            bisections over sizes and places), ``"verify"`` (of solutions).
        largest: members of the largest groups that were considered.
        considered: groups that were considered, those of one included.
        missing: names of the groups whose performance was asked for and is not known.
        notes: sentences on what the answer depends on.
    """

    degradations: tuple[str, ...]
    delta: float
    groups: tuple[tuple[str, ...], ...]
    drops: Mapping[str, float]
    trace: tuple[Step, ...] = ()
    trainings: Mapping[str, int] = field(default_factory=dict)
    largest: int = 0
    considered: int = 0
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def compression(self) -> float:
        """The share of networks that grouping saves: ``1 - groups / degradations``."""
        return 1 - len(self.groups) / len(self.degradations)

    @property
    def bisection(self) -> tuple[tuple[int, bool], ...]:
        """The numbers of groups that were tried, and whether there is a solution with at most as many."""
        return tuple((step.number, step.passed) for step in self.trace if step.stage == "cover")

    def group_of(self, degradation: str) -> tuple[str, ...]:
        """The group that a degradation is in.

        Raises:
            ValueError: it is in none.
        """
        for group in self.groups:
            if degradation in group:
                return group
        raise ValueError(f"degradation: expected one of {', '.join(self.degradations)}, got {degradation!r}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        content = _for_json({"format": FORMAT, **asdict(self)})
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_whole(path, text.encode("utf-8"))


def load_grouping(path: str | os.PathLike[str]) -> Grouping:
    """Read what `Grouping.save` has written.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or groups that are no partition.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"expected a file of the format {FORMAT!r}")
        content["groups"] = tuple(map(tuple, content["groups"]))
        content["drops"] = {name: float(value) for name, value in content["drops"].items()}
        content["trace"] = tuple(Step(**{**step, "drop": float(step["drop"])}) for step in content["trace"])
        for name in ("degradations", "missing", "notes"):
            content[name] = tuple(content[name])
        grouping = Grouping(**content)
        check_groups(grouping.groups, grouping.degradations)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as a grouping: {error}") from error
    return grouping


def search_groups(
    degradations: Sequence[str],
    performance: Performance,
    delta: float = DELTA,
    ranking: Ranking | None = None,
    exact: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Grouping:
    """Divide degradations into the fewest groups of which none costs a member more than ``delta``.

    Args:
        degradations: names.
        performance: P of the networks: from a table (`mirage.grids.CachedPerformance`), or by training them
            (`mirage.grids.TrainAndMeasure`). What it does not know is infeasible, and reported.
        delta: dB that a degradation may lose by sharing a network.
        ranking: of the groups, most alike first (`mirage.grids.rank_groups`): trainings are spent along it. None:
            the groups whose performance is known without training are all that is considered.
        exact: look for solutions of exactly as many groups as the bisection is at, as the paper's text has it; else of
            at most as many, which makes the bisection sound. The least number is the same.
        on_step: called with each `Step` as it is done.

    Raises:
        ValueError: names come twice, the ranking is of other ones, or ``delta`` is not a number.
    """
    return GroupSearch(degradations, performance, delta, ranking, exact, on_step).run()


class GroupSearch:
    """A search whose parts can be called by themselves; the arguments are `search_groups`'s.

    Attributes:
        trace, trainings, missing: as of `Grouping`, so far.
        largest: members of the largest groups that are considered, once they are known.
    """

    def __init__(
        self,
        degradations: Sequence[str],
        performance: Performance,
        delta: float = DELTA,
        ranking: Ranking | None = None,
        exact: bool = False,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self.degradations = check_degradations(degradations)
        if not math.isfinite(delta):
            raise ValueError(f"delta: expected a number of dB, got {delta}")
        if ranking is not None and set(ranking.degradations) != set(self.degradations):
            names = ", ".join(self.degradations)
            raise ValueError(f"ranking: expected one of {names}, got one of {', '.join(ranking.degradations)}")
        self.performance, self.delta, self.ranking, self.exact = performance, delta, ranking, exact
        self.trace: list[Step] = []
        self.trainings = {"single": 0, "prepare": 0, "verify": 0}
        self.missing: dict[Group, None] = {}
        self.largest = 0
        self._on_step = on_step or (lambda step: None)
        self._single: dict[str, float] = {}
        self._drops: dict[Group, float] = {}
        self._candidates: list[Group] | None = None

    # --- what groups cost

    def name(self, group: Group) -> str:
        """The group's name, its members in the order of the search."""
        return group_name(group, self.degradations)

    def drops(self, groups: Sequence[Group], purpose: str = "verify") -> list[tuple[float, bool]]:
        """What each group costs in dB, and whether a network was trained to know; several may be trained at once."""
        self._train_singles()
        new = [group for group in dict.fromkeys(groups) if group not in self._drops and len(group) > 1]
        trained = self._measure(new, purpose)
        return [(self._drops.get(group, 0.0), group in trained) for group in groups]

    def _train_singles(self) -> None:
        if self._single:
            return
        singles = [frozenset([name]) for name in self.degradations]
        known = [self.performance.is_known(group) for group in singles]
        for name, group, was_known, found in zip(
            self.degradations, singles, known, self.performance.measure(singles), strict=True
        ):
            self._single[name] = math.nan if found is None or name not in found else found[name]
            if math.isnan(self._single[name]):
                self.missing[group] = None
            elif not was_known:
                self.trainings["single"] += 1

    def _measure(self, groups: Sequence[Group], purpose: str) -> set[Group]:
        """Have groups measured, all at once; returns those that a network was trained for."""
        if not groups:
            return set()
        unknown = {group for group in groups if not self.performance.is_known(group)}
        single = {name: value for name, value in self._single.items() if not math.isnan(value)}
        trained = set()
        for group, found in zip(groups, self.performance.measure(groups), strict=True):
            drop = delta_p(group, found, single)
            self._drops[group] = math.inf if math.isnan(drop) else drop
            if found is None or any(name not in found for name in group):
                self.missing[group] = None
            elif group in unknown:
                trained.add(group)
        self.trainings[purpose] += len(trained)
        return trained

    def _note(self, step: Step) -> None:
        self.trace.append(step)
        self._on_step(step)

    # --- which groups are worth considering

    def candidates(self) -> list[Group]:
        """The groups that solutions are made of, largest first, each size in its order; worked out once."""
        if self._candidates is None:
            self._candidates = self._all_known() if self.ranking is None else self._along(self.ranking)
            self.largest = max(map(len, self._candidates))
        return self._candidates

    def _all_known(self) -> list[Group]:
        places = {name: i for i, name in enumerate(self.degradations)}
        known = [group for group in self.performance.known() if len(group) > 1 and group <= set(places)]
        self.drops(known, "prepare")
        groups = [group for group in dict.fromkeys(known) if is_feasible(self._drops[group], self.delta)]
        groups.sort(key=lambda group: (-len(group), sorted(places[name] for name in group)))
        return [*groups, *(frozenset([name]) for name in self.degradations)]

    def _along(self, ranking: Ranking) -> list[Group]:
        sizes = range(self._largest_size(ranking), 0, -1)
        ends = self._ends(ranking, [size for size in sizes if size > 1])
        return [each.group for size in sizes for each in ranking.of_size(size)[: ends.get(size)]]

    def _largest_size(self, ranking: Ranking) -> int:
        """The largest number of members whose most alike group is feasible, by bisection."""
        low, high = 1, len(self.degradations)
        self._train_singles()
        while low < high:
            middle = (low + high + 1) // 2
            group = ranking.of_size(middle)[0].group
            [(drop, trained)] = self.drops([group], "prepare")
            passed = is_feasible(drop, self.delta)
            self._note(Step("size", middle, passed, self.name(group), 1, drop, trained))
            low, high = (middle, high) if passed else (low, middle - 1)
        return low

    def _ends(self, ranking: Ranking, sizes: Sequence[int]) -> dict[int, int]:
        """How many groups of each size come up to the last feasible one, by bisections that go side by side."""
        bounds = {size: (0, len(ranking.of_size(size))) for size in sizes}
        while open_ := {size: (low + high + 1) // 2 for size, (low, high) in bounds.items() if low < high}:
            groups = [ranking.of_size(size)[place - 1].group for size, place in open_.items()]
            for (size, place), group, (drop, trained) in zip(
                open_.items(), groups, self.drops(groups, "prepare"), strict=True
            ):
                passed = is_feasible(drop, self.delta)
                self._note(Step("rank", size, passed, self.name(group), place, drop, trained))
                low, high = bounds[size]
                bounds[size] = (place, high) if passed else (low, place - 1)
        return {size: low for size, (low, _) in bounds.items()}

    # --- covers

    def solve(self, count: int) -> tuple[Group, ...] | None:
        """The first solution with at most (``exact``: exactly) so many groups; None where there is none."""
        return next(self.all_solutions(count), None)

    def all_solutions(self, count: int) -> Iterator[tuple[Group, ...]]:
        """All solutions with at most (``exact``: exactly) so many groups, each verified, in the search's order."""
        cover = _Cover(self.candidates(), self.degradations, count, self.exact)
        cover.drop({group for group, drop in self._drops.items() if not is_feasible(drop, self.delta)})
        for groups in cover.solutions():
            failed = self._failing(groups, count)
            if failed:
                cover.drop(failed)
            else:
                yield groups

    def _failing(self, groups: Sequence[Group], count: int) -> set[Group]:
        """The groups of a solution that cost too much; trained for, where that is not known, until one fails."""
        new = [group for group in groups if len(group) > 1 and group not in self._drops]
        at_once = max(1, self.performance.parallel)
        for start in range(0, len(new), at_once):
            part = new[start : start + at_once]
            for group, (drop, trained) in zip(part, self.drops(part), strict=True):
                passed = is_feasible(drop, self.delta)
                self._note(Step("verify", count, passed, self.name(group), 0, drop, trained))
            failed = {group for group in part if not is_feasible(self._drops[group], self.delta)}
            if failed:
                return failed
        return set()

    def run(self) -> Grouping:
        """The whole search."""
        candidates = self.candidates()
        left, right = 1, len(self.degradations)
        best = tuple(frozenset([name]) for name in self.degradations)
        while left < right:
            middle = (left + right) // 2
            found = self.solve(middle)
            self._note(Step("cover", middle, found is not None))
            if found is not None:
                best, right = found, middle
            else:
                left = middle + 1
        self._train_singles()
        return Grouping(
            degradations=self.degradations,
            delta=self.delta,
            groups=tuple(tuple(name for name in self.degradations if name in group) for group in best),
            drops={self.name(group): self._drops.get(group, 0.0) for group in best},
            trace=tuple(self.trace),
            trainings=dict(self.trainings),
            largest=self.largest,
            considered=len(candidates),
            missing=tuple(self.name(group) for group in self.missing),
            notes=tuple(self._remarks(candidates)),
        )

    def _remarks(self, candidates: Sequence[Group]) -> Iterator[str]:
        single = [self.name(group) for group in self.missing if len(group) == 1]
        if single:
            yield f"performance: not known of {_some(single)} alone, so larger groups with it count as infeasible"
        larger = [self.name(group) for group in self.missing if len(group) > 1]
        if larger:
            yield f"performance: not known of {_some(larger)}, which counts as infeasible"
        if self.ranking is None:
            every = 2 ** len(self.degradations) - 1
            known = {group for group in self.performance.known() if group <= set(self.degradations)}
            known |= {group for group in candidates if len(group) == 1}
            if len(known) < every:
                yield (
                    f"performance: {len(known)} of {every} groups are known, and no ranking was given: the others "
                    "count as infeasible"
                )


class _Cover:
    """Depth-first search for disjoint groups that cover a set, with at most (``exact``: exactly) ``count`` of them.

    Groups are tried in increasing order. What is left is given up where no groups at all, in any order, can cover it
    with as many as are left, which is looked up by what is left alone: the way to the first solution then never turns
    back. Groups can be dropped while the search is going on.
    """

    def __init__(self, groups: Sequence[Group], names: Sequence[str], count: int, exact: bool) -> None:
        bits = {name: 1 << i for i, name in enumerate(names)}
        self.groups, self.count, self.exact = list(groups), count, exact
        self.masks = [sum(bits[name] for name in group) for group in groups]
        self.sizes = [len(group) for group in groups]
        self.all = (1 << len(names)) - 1
        self.dropped: set[int] = set()
        self._with: dict[int, list[tuple[int, int]]] = {bit: [] for bit in bits.values()}  # groups by their lowest bit
        for i, mask in enumerate(self.masks):
            self._with[mask & -mask].append((i, mask))
        self._known: dict[tuple[int, int], bool] = {}

    def drop(self, groups: set[Group]) -> None:
        """Do without these groups from now on."""
        self.dropped |= {i for i, group in enumerate(self.groups) if group in groups}
        self._known.clear()

    def solutions(self) -> Iterator[tuple[Group, ...]]:
        """Each solution once, unless a group of it has been dropped by then."""
        for chosen in self._from(0, self.all, ()):
            yield tuple(self.groups[i] for i in chosen)

    def _from(self, start: int, left: int, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not left:
            if len(chosen) == self.count or not self.exact:
                yield chosen
            return
        more = self.count - len(chosen)
        for i in range(start, len(self.groups)):
            # Sizes only fall from here on, so later groups cover no more than this one's size each.
            if self.dropped.intersection(chosen) or self.sizes[i] * more < left.bit_count():
                return
            mask = self.masks[i]
            if i not in self.dropped and mask & left == mask and self._can(left ^ mask, more - 1):
                yield from self._from(i + 1, left ^ mask, (*chosen, i))

    def _can(self, left: int, count: int) -> bool:
        """Whether groups, whatever their order, cover exactly what is left with so many."""
        if not left:
            return count == 0 or not self.exact
        if count * self.sizes[0] < left.bit_count():
            return False
        state = (left, count)
        if state not in self._known:
            self._known[state] = any(
                mask & left == mask and i not in self.dropped and self._can(left ^ mask, count - 1)
                for i, mask in self._with[left & -left]
            )
        return self._known[state]


def _for_json(value: Any) -> Any:
    """JSON has neither infinity nor NaN: their texts in their place, which ``float`` reads."""
    if isinstance(value, dict):
        return {name: _for_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
