"""The distance above which a photograph is foreign to all groups, from photographs that are not.

GRIDS's limit is 4.0, for its own descriptor. Distances of another one, or of less varied references, are others: S is
a logarithm, and a single picture's features differ from the mean of its group by what the picture shows too. The limit
that is taken here is the distance that most degraded pictures of a group's own degradations stay below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirage.grids.groups import check_names
from mirage.grids.kept import Kept, fingerprint_of
from mirage.whole_files import write_whole

if TYPE_CHECKING:
    from mirage.grids.restorer import GroupedRestorer

__all__ = ["SHARE", "Calibration", "calibrate", "degraded"]

FORMAT = "mirage foreign limit, version 1"
KEPT_FORMAT = "mirage distances of photographs, version 1"
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
    restorer: GroupedRestorer, pictures: Iterable[tuple[str, np.ndarray]], share: float = SHARE,
    cache: str | Path | None = None,
) -> Calibration:  # fmt: skip
    """The limit for a restorer's groups, descriptor and number of crops. No network restores.

    Args:
        restorer: whose ``foreign`` stays as it is; set it to the result's ``limit``.
        pictures: names of degradations that the groups have, and images degraded by them, as `mirage.Restorer` takes
            them. Others than the references were made of, where there are enough.
        share: of the pictures that are to be below the limit.
        cache: a JSON file, read and added to as each picture is done: what was measured with the same groups,
            descriptor and settings is not measured again. It needs a descriptor with a ``fingerprint``.

    Raises:
        ValueError: there are no pictures, a degradation is in no group, the share is not in (0, 1], or the cache is
            none.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")
    group_of = {name: group for group, each in restorer.groups.items() for name in each.degradations}
    nearest = _Nearest(restorer, cache)
    found: dict[str, list[tuple[str, float]]] = {}
    for name, image in pictures:
        check_names([name], group_of, "pictures")
        found.setdefault(name, []).append(nearest(name, image))
    if not found:
        raise ValueError("pictures: expected at least one, got none")
    distances = {name: tuple(distance for _, distance in choices) for name, choices in found.items()}
    own = {name: float(np.mean([group == group_of[name] for group, _ in choices])) for name, choices in found.items()}
    limit = np.quantile([value for each in distances.values() for value in each], share, method="higher")
    return Calibration(float(limit), share, distances, own)


class _Nearest:
    """The group nearest to a picture, and its distance, as long as they are kept measured once."""

    def __init__(self, restorer: GroupedRestorer, cache: str | Path | None) -> None:
        self.restorer = restorer
        self.kept = None if cache is None else Kept(cache, KEPT_FORMAT)
        self.common = "" if cache is None else _distances_of(restorer)

    def __call__(self, name: str, image: np.ndarray) -> tuple[str, float]:
        if self.kept is None:
            return self._measured(image)
        digest = hashlib.sha256(f"{self.common} {image.dtype} {image.shape}".encode())
        digest.update(np.ascontiguousarray(image).tobytes())
        entry = self.kept.find(digest.hexdigest())
        if entry is None:
            group, distance = self._measured(image)
            self.kept.add(digest.hexdigest(), {"name": name, "group": group, "distance": distance})
            return group, distance
        return entry["group"], entry["distance"]

    def _measured(self, image: np.ndarray) -> tuple[str, float]:
        choice = self.restorer.select(image)
        return choice.group, float(choice.distance)


def _distances_of(restorer: GroupedRestorer) -> str:
    """Digest of everything that distances depend on beside the picture: not networks, and not the limit."""
    settings = [restorer.crops, restorer.components, restorer.patch, restorer.seed]
    groups = {
        group: {name: [ggd.alpha, ggd.sigma] for name, ggd in each.ggds.items()}
        for group, each in restorer.groups.items()
    }
    content = [KEPT_FORMAT, fingerprint_of(restorer.descriptor), settings, groups]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def degraded(measure: Any, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures of a `mirage.grids.MeasureGroup` under each degradation, as `calibrate` takes them."""
    for name in names:
        for seen, _ in measure.pairs(name):
            yield name, seen
