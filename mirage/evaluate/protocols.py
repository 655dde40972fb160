"""The paper's protocols: which sets, which noise, and the published rows (arXiv 2505.18679v2, in `paper.json`)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mirage.evaluate.run import SIGMAS, Task
from mirage.evaluate.sets import ImageSet, find_sets

__all__ = ["ALIASES", "Column", "PaperRow", "Protocol", "plan", "protocol", "protocol_names"]

ALIASES = {
    "BSD68": ("CBSD68", "denoise/bsd68", "denoise/CBSD68"),
    "Rain100L": ("Rain100L_test", "derain/Rain100L"),
    "SOTS": ("SOTS_outdoor", "SOTS-outdoor", "outdoor", "dehaze"),
    "GoPro": ("deblur/gopro",),
    "LOLv1": ("LOL", "LOL_eval15", "eval15", "enhance/lol"),
    "Outdoor-Rain": ("Outdoor-Rain-8-8-8", "OutdoorRain", "test1"),
    "RainDrop": ("raindrop/test_a", "test_a"),
    "Snow100K-S": ("Snow100K-S/Snow100K-S", "media/jdway/GameSSD/overlapping/test/Snow100K-S"),
    "Snow100K-L": ("Snow100K-L/Snow100K-L", "media/jdway/GameSSD/overlapping/test/Snow100K-L"),
}
"""Other names of the paper's sets, and folders of the released layout and of the downloads, by the paper's name."""


@dataclass(frozen=True)
class Column:
    """A column of the paper's table: a set, the noise that is added (units of 1/255, or None), and how many images it
    has (None where the paper does not say)."""

    name: str
    set: str
    sigma: float | None = None
    images: int | None = None

    def is_of(self, name: str) -> bool:
        """Whether a set called ``name`` is this column's."""
        return _plain(name) in {_plain(each) for each in (self.set, *ALIASES.get(self.set, ()))}


@dataclass(frozen=True)
class PaperRow:
    """A published row. ``values[i][j]``: the ``j``-th metric of the ``i``-th column, in the end of the average where
    the protocol has one; None where the paper has a dash. ``group``: the heading it stands under, if any."""

    method: str
    values: tuple[tuple[float | None, ...], ...]
    venue: str | None = None
    params: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Protocol:
    """A table of the paper.

    Attributes:
        name: as on the command line.
        table, title: where it stands and what it is of.
        metrics: what each column has.
        crop: images are cut to multiples of this by the released evaluation; 0: they are not.
        average: the table has an average of its columns.
    """

    name: str
    table: str
    title: str
    metrics: tuple[str, ...]
    crop: int
    average: bool
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]


@functools.cache
def _protocols() -> dict[str, Protocol]:
    text = resources.files("mirage.evaluate").joinpath("paper.json").read_text(encoding="utf-8")
    return {name: _protocol(name, content) for name, content in json.loads(text).items()}


def _protocol(name: str, content: dict) -> Protocol:
    rows = [PaperRow(**{**row, "values": tuple(map(tuple, row["values"]))}) for row in content["rows"]]
    columns = tuple(Column(**column) for column in content["columns"])
    return Protocol(
        **{**content, "name": name, "metrics": tuple(content["metrics"]), "columns": columns, "rows": tuple(rows)}
    )


def protocol_names() -> list[str]:
    """The names that `protocol` knows."""
    return list(_protocols())


def protocol(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in _protocols():
        raise ValueError(f"protocol: expected one of {', '.join(_protocols())}, got {name!r}")
    return _protocols()[name]


def plan(
    sets: Sequence[ImageSet],
    sigmas: Sequence[float] = SIGMAS,
    of: Protocol | None = None,
    kinds: Sequence[str] = (),
) -> tuple[list[Task], list[str]]:
    """What to evaluate: each set, clean ones at each sigma and of each kind; with a protocol its columns, then the sets
    that it lacks.

    Args:
        kinds: names of degradations that clean images get, see `mirage.degradations.create`.

    Returns:
        The tasks, and a note for each column without a set.
    """
    if of is None:
        return [task for each in sets for task in _tasks(each, sigmas, kinds)], []
    tasks: list[Task] = []
    notes = []
    for column in of.columns:
        found = [each for each in sets if column.is_of(each.name)]
        tasks += [Task(each, column.sigma) for each in found]
        if not found:
            notes.append(f"{column.name} left out: no --set {column.set}=DIR")
        wrong = [each for each in found if each.clean != (column.sigma is not None)]
        if wrong:
            what = "clean images alone" if column.sigma is not None else "pairs of input and target"
            raise ValueError(f"set {wrong[0].name}: {of.table} asks for {what}")
    known = {task.set.name for task in tasks}
    return tasks + [task for each in sets if each.name not in known for task in _tasks(each, sigmas, kinds)], notes


def find_below(root: str | Path, of: Protocol) -> list[ImageSet]:
    """The sets of a protocol that lie below ``root``, in the released layout or under names of `ALIASES`."""
    root = Path(root)
    found: list[ImageSet] = []
    for name in dict.fromkeys(column.set for column in of.columns):
        places = [root / each for each in (name, *ALIASES.get(name, ())) if (root / each).is_dir()]
        if places:
            found += find_sets(name, places[0])
    if not found and (root / "clear").is_dir() or (root / "test" / "clear").is_dir():
        found = find_sets("CDD11", root)
    return found


def _tasks(of: ImageSet, sigmas: Sequence[float], kinds: Sequence[str]) -> list[Task]:
    if not of.clean:
        return [Task(of)]
    return [*(Task(of, float(sigma)) for sigma in sigmas), *(Task(of, kind=kind) for kind in kinds)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
