"""Performances by training and measuring, kept on disk: `TrainAndMeasure`."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mirage.grids.groups import Group, group_name
from mirage.grids.performance import Values
from mirage.grids.settings import keep_settings
from mirage.grids.workers import Workers
from mirage.whole_files import write_whole

__all__ = ["TrainAndMeasure", "TrainingFailed"]

FORMAT = "mirage grids trainings, version 1"
RESULT, WEIGHTS, RUN, LOCK = "result.json", "weights.safetensors", "run", "lock"


class TrainingFailed(RuntimeError):
    """Networks of groups could not be trained or measured; the message says which and why. The others are kept."""


class Train(Protocol):
    """Trains a network, such as `mirage.grids.TrainGroup`; pickled for other processes."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, group: Sequence[str], folder: Path, weights: Path) -> None: ...


class Measure(Protocol):
    """Measures a network, such as `mirage.grids.MeasureGroup`; pickled for other processes."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, weights: Path, group: Sequence[str]) -> Mapping[str, Sequence[float]]: ...


class TrainAndMeasure:
    """A performance (`mirage.grids.Performance`) that trains what it is asked for and does not have yet.

    Each group has a folder below ``folder``, by the names of its members in alphabetical order (``GB+MB+RL``): the run
    of the trainer, its weights, and ``result.json``. No group is trained twice: a lock keeps other processes and
    machines off a group that is being trained, and what a process that was killed had reached is gone on from.

    Args:
        folder: of everything; machines of a cluster all reach it.
        train: how, such as a `mirage.grids.TrainGroup`.
        measure: how, such as a `mirage.grids.MeasureGroup`; None where networks are trained alone.
        workers: how many at a time, and where.
        on_begin, on_done: called with the name of each group that is to be trained or waited for, and when it is done.

    Raises:
        ValueError: the folder holds trainings of other settings; the message says which.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        train: Train,
        measure: Measure | None = None,
        *,
        workers: Workers | int | None = None,
        on_begin: Callable[[str], None] | None = None,
        on_done: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.train, self.measure_group = Path(folder), train, measure
        self.workers = workers if isinstance(workers, Workers) else Workers(workers)
        self.on_begin = on_begin or (lambda name: None)
        self.on_done = on_done or (lambda name: None)
        self._values: dict[Group, dict[str, float]] = {}
        identities = {"train": train.identity} | ({} if measure is None else {"measure": measure.identity})
        keep_settings(self.folder, FORMAT, identities)

    @property
    def parallel(self) -> int:
        return self.workers.parallel

    # --- the protocol

    def is_known(self, group: Group) -> bool:
        return self._find(frozenset(group)) is not None

    def known(self) -> Iterator[Group]:
        for path in sorted(self.folder.glob(f"*/{RESULT}")):
            group = frozenset(path.parent.name.split("+"))
            if self.is_known(group):
                yield group

    def measure(self, groups: Sequence[Group]) -> list[Values | None]:
        """P of each group's network; those that are not known are trained, several at a time.

        Raises:
            TrainingFailed: of one or more groups, after the others are done.
            Stopped: (a KeyboardInterrupt) it was told to stop; what was going on is saved.
            ValueError: there is nothing to measure with, or a result is damaged.
        """
        if self.measure_group is None:
            raise ValueError("measure: expected what to measure with, got None: networks here are trained alone")
        self._do([group for group in groups if not self.is_known(group)])
        return [self._find(frozenset(group)) for group in groups]

    # --- what is on disk

    def folder_of(self, group: Group) -> Path:
        """The folder of a group."""
        return self.folder / group_name(group)

    def weights_of(self, groups: Sequence[Group]) -> list[Path]:
        """The weights of each group's network, trained where they are not there yet.

        Raises:
            TrainingFailed, Stopped: as `measure`.
        """
        self._do([group for group in groups if not (self.folder_of(group) / WEIGHTS).exists()])
        return [self.folder_of(group) / WEIGHTS for group in groups]

    def steps_of(self, name: str) -> int | None:
        """Optimizer steps of a group's training in all, where the configuration says it in steps."""
        return getattr(self.train, "steps", None)

    def step_of(self, name: str) -> int:
        """The last optimizer step that a group's trainer has told."""
        try:
            with open(self.folder / group_name(name.split("+")) / RUN / "train.csv", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
                last = file.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            return int(last.partition(",")[0])
        except (OSError, ValueError):
            return 0

    def _find(self, group: Group) -> dict[str, float] | None:
        if group not in self._values:
            found = _read_result(self.folder_of(group), group)
            if found is None:
                return None
            self._values[group] = found
        return self._values[group]

    def _do(self, groups: Sequence[Group]) -> None:
        todo = [tuple(sorted(group)) for group in dict.fromkeys(groups)]
        if not todo:
            return
        for members in todo:
            self.on_begin(group_name(members))
        work = functools.partial(_train_and_measure, folder=self.folder, train=self.train, measure=self.measure_group)
        failed: dict[str, Exception] = {}
        for number, result in self.workers.run(work, todo):
            if isinstance(result, Exception):
                failed[group_name(todo[number])] = result
            self.on_done(group_name(todo[number]))
        if failed:
            reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise TrainingFailed(f"{len(failed)} of {len(todo)} groups: {reasons}") from next(iter(failed.values()))


def _train_and_measure(members: tuple[str, ...], folder: Path, train: Train, measure: Measure | None) -> bool:
    """One group, in whichever process; returns whether a network was trained here."""
    from filelock import FileLock

    place = folder / group_name(members)
    place.mkdir(parents=True, exist_ok=True)
    weights = place / WEIGHTS
    with FileLock(place / LOCK):  # the system opens it when its holder is killed
        trained = not weights.exists()
        begin = time.monotonic()
        if trained:
            train(members, place / RUN, weights)
        seconds = time.monotonic() - begin
        if measure is not None and _read_result(place, frozenset(members)) is None:
            values = {name: [float(value) for value in each] for name, each in measure(weights, members).items()}
            means = {name: math.fsum(each) / len(each) for name, each in values.items()}
            if not all(map(math.isfinite, means.values())):
                raise ValueError(f"PSNR is not finite: {means}")
            content = {"group": list(members), "psnr": means, "pictures": values, "seconds_of_last_run": seconds}
            write_whole(place / RESULT, (json.dumps(content) + "\n").encode("utf-8"))
    return trained


def _read_result(place: Path, group: Group) -> dict[str, float] | None:
    path = place / RESULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as a result: {error}; delete it to have it measured again") from error
    try:
        found = {str(name): float(value) for name, value in content["psnr"].items()}
        if set(found) != set(group) or not all(map(math.isfinite, found.values())):
            raise ValueError(f"expected finite PSNR of {group_name(group)}, got {found}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as a result: {error}; delete it to have it measured again") from error
    return found
