"""The distance above which a photograph is foreign to all groups, from photographs that are not.

GRIDS's limit is 4.0, for its own descriptor. Distances of another one, or of less varied references, are others: S is
a logarithm, and a single picture's features differ from the mean of its group by what the picture shows too. The limit
that is taken here is the distance that most degraded pictures of a group's own degradations stay below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirage.grids.groups import check_names
from mirage.whole_files import write_whole

if TYPE_CHECKING:
    from mirage.grids.restorer import Choice, GroupedRestorer

__all__ = ["SHARE", "Calibration", "calibrate", "degraded"]

FORMAT = "mirage foreign limit, version 1"
SHARE = 0.95
"""Of the pictures of known degradations, that are to be below the limit."""


@dataclass(frozen=True)
class Calibration:
    """What is known of degraded pictures.

    Attributes:
        limit: the distance that ``share`` of all the pictures do not pass.
        share: in (0, 1].
        distances: of each picture from the group nearest to it, by degradation.
        own_group: the part of the pictures whose nearest group is that of their degradation, by degradation.
    """

    limit: float
    share: float
    distances: Mapping[str, tuple[float, ...]]
    own_group: Mapping[str, float]

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(Path(path), (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode("utf-8"))


def calibrate(
    restorer: GroupedRestorer, pictures: Iterable[tuple[str, np.ndarray]], share: float = SHARE
) -> Calibration:
    """The limit for a restorer's groups, descriptor and number of crops. No network restores.

    Args:
        restorer: whose ``foreign`` stays as it is; set it to the result's ``limit``.
        pictures: names of degradations that the groups have, and images degraded by them, as `mirage.Restorer` takes
            them. Others than the references were made of, where there are enough.
        share: of the pictures that are to be below the limit.

    Raises:
        ValueError: there are no pictures, a degradation is in no group, or the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")
    group_of = {name: group for group, each in restorer.groups.items() for name in each.degradations}
    found: dict[str, list[Choice]] = {}
    for name, image in pictures:
        check_names([name], group_of, "pictures")
        found.setdefault(name, []).append(restorer.select(image))
    if not found:
        raise ValueError("pictures: expected at least one, got none")
    distances = {name: tuple(choice.distance for choice in choices) for name, choices in found.items()}
    own = {name: float(np.mean([each.group == group_of[name] for each in choices])) for name, choices in found.items()}
    limit = np.quantile([value for each in distances.values() for value in each], share, method="higher")
    return Calibration(float(limit), share, distances, own)


def degraded(measure: Any, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures of a `mirage.grids.MeasureGroup` under each degradation, as `calibrate` takes them."""
    for name in names:
        for seen, _ in measure.pairs(name):
            yield name, seen
