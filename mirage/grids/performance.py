"""How well networks of groups restore: the protocol that a search asks, and tables that answer it.

P(M, d) is the PSNR in dB of a network M on a degradation d. The network of a group is trained on all its degradations;
that of a group of one is the single-task network.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mirage.grids.groups import Group, check_names, group_name, parse_group
from mirage.whole_files import write_whole
from mirage.wording import counted

__all__ = ["PUBLISHED", "CachedPerformance", "Performance", "published", "read_performance", "write_performance"]

FORMAT = "mirage grids performance, version 1"
COLUMNS = ("group", "degradation", "psnr")
PUBLISHED = ("restormer", "srresnet")
"""Networks whose values GRIDS has published (arXiv 2407.12273, Tables 1 and 2)."""

Values = Mapping[str, float]


@runtime_checkable
class Performance(Protocol):
    """What `mirage.grids.search_groups` asks.

    Attributes:
        parallel: groups that `measure` works on at a time; a search asks for as many at once where it may not need all.
    """

    parallel: int

    def is_known(self, group: Group) -> bool:
        """Whether `measure` answers without training."""
        ...

    def known(self) -> Iterable[Group]:
        """The groups that are known."""
        ...

    def measure(self, groups: Sequence[Group]) -> list[Values | None]:
        """P of each group's network on each of its members, in dB; None: not known, and not to be had."""
        ...


class CachedPerformance:
    """Values that are there; nothing is trained.

    Args:
        values: by group (a collection of names, or text such as ``"GB+MB"``): P in dB by degradation.

    Raises:
        ValueError: a group comes twice, a value is not a finite number, or of a degradation outside the group.
    """

    parallel = 1

    def __init__(self, values: Mapping[Any, Values]) -> None:
        self.values: dict[Group, dict[str, float]] = {}
        for key, found in values.items():
            group = parse_group(key) if isinstance(key, str) else frozenset(key)
            if group in self.values:
                raise ValueError(f"values: {group_name(group)} comes twice")
            self.values[group] = _checked(group, found)

    def is_known(self, group: Group) -> bool:
        return frozenset(group) in self.values

    def known(self) -> list[Group]:
        return list(self.values)

    def measure(self, groups: Sequence[Group]) -> list[Values | None]:
        return [self.values.get(frozenset(group)) for group in groups]

    @property
    def degradations(self) -> tuple[str, ...]:
        """All names, in the order of their first appearance."""
        return tuple(dict.fromkeys(name for found in self.values.values() for name in found))

    def __repr__(self) -> str:
        return f"CachedPerformance({counted(len(self.values), 'group')} of {', '.join(self.degradations)})"


def _checked(group: Group, found: Values) -> dict[str, float]:
    name = group_name(group)
    if not group:
        raise ValueError("values: expected groups of at least one degradation, got an empty one")
    check_names(found, sorted(group), f"values of {name}")
    for each, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"values of {name}: expected a finite number of dB for {each}, got {value!r}")
    return {each: float(value) for each, value in found.items()}


@lru_cache(maxsize=1)
def _published() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def published(network: str = "restormer") -> CachedPerformance:
    """The values that GRIDS has published, with its misprints corrected (the file ``published.json`` tells them).

    Args:
        network: ``"restormer"``: 11 single-task networks and 17 groups; ``"srresnet"``: 11 and 5.

    Raises:
        ValueError: another network.
    """
    if network not in PUBLISHED:
        raise ValueError(f"network: expected one of {', '.join(PUBLISHED)}, got {network!r}")
    return CachedPerformance({each["group"]: each["psnr"] for each in _published()["networks"][network]})


def read_performance(path: str | os.PathLike[str], degradations: Collection[str] | None = None) -> CachedPerformance:
    """Read a table of performances, JSON or CSV.

    JSON is as `write_performance` writes it, ``{"format": ..., "groups": [{"group": "GB+MB", "psnr": {"GB": 27.9,
    ...}}]}``; CSV has the columns ``group`` (``GB+MB``), ``degradation`` and ``psnr``. ``published:restormer`` and
    ``published:srresnet`` stand for the published ones.

    Args:
        path: of the file.
        degradations: the names that may come; None: any.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such table, has unknown names, or a group or value twice; the message names the file.
    """
    if str(path).startswith("published:"):
        found = published(str(path).removeprefix("published:"))
    else:
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
            found = CachedPerformance(_from_csv(text) if path.suffix.lower() == ".csv" else _from_json(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not readable as JSON: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if degradations is not None:
        try:
            check_names(found.degradations, degradations, "degradations")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return found


def write_performance(performance: Performance, path: str | os.PathLike[str], order: Sequence[str] = ()) -> None:
    """Write what is known as JSON, or as CSV where the path ends so; whole or not at all.

    Args:
        performance: whose known groups are written.
        path: of the file.
        order: of names within groups and of groups of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    places = {name: i for i, name in enumerate(order)}
    known = sorted(
        performance.known(),
        key=lambda group: (len(group), sorted((places.get(name, len(places)), name) for name in group)),
    )
    rows = [(group_name(group, order), found) for group, found in zip(known, performance.measure(known), strict=True)]
    if path.suffix.lower() == ".csv":
        lines = [",".join(COLUMNS), *(f"{name},{d},{v!r}" for name, found in rows for d, v in (found or {}).items())]
        text = "\n".join(lines) + "\n"
    else:
        groups = [{"group": name, "psnr": dict(found or {})} for name, found in rows]
        text = json.dumps({"format": FORMAT, "groups": groups}, indent=1) + "\n"
    write_whole(path, text.encode("utf-8"))


def _from_json(text: str) -> dict[str, Values]:
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("groups"), list):
        raise ValueError(f"expected a table of the format {FORMAT!r}")
    values: dict[str, Values] = {}
    for i, each in enumerate(content["groups"]):
        right = isinstance(each, dict) and isinstance(each.get("group"), str) and isinstance(each.get("psnr"), dict)
        if not right:
            raise ValueError(f'groups[{i}]: expected {{"group": "GB+MB", "psnr": {{"GB": 27.9, ...}}}}, got {each!r}')
        if each["group"] in values:
            raise ValueError(f"groups[{i}]: {each['group']} comes twice")
        values[each["group"]] = each["psnr"]
    return values


def _from_csv(text: str) -> dict[str, Values]:
    rows = csv.DictReader(text.splitlines())
    if not set(COLUMNS) <= set(rows.fieldnames or ()):
        raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {', '.join(rows.fieldnames or ()) or 'none'}")
    values: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows, 2):
        of_group = values.setdefault(row["group"] or "", {})
        name = (row["degradation"] or "").strip()
        if name in of_group:
            raise ValueError(f"line {number}: {name} of {row['group']} comes twice")
        try:
            of_group[name] = float(row["psnr"] or "")
        except ValueError as error:
            raise ValueError(f"line {number}: psnr: expected a number, got {row['psnr']!r}") from error
    return values  # type: ignore[return-value]
