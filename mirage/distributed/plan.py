"""What there is to do: listed once, piece by piece, before the first file is restored.

So the number of files is known, two inputs that would write one output are told apart, and a restarted worker meets the
same list. A file takes about 60 bytes here, as only digests of names are kept, and 160 in the store of Ray.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mirage.distributed.manifest import FAILED, PRESENT, History, Record
from mirage.distributed.places import Entry, Place, digest
from mirage.images import FORMATS, SUFFIXES
from mirage.whole_files import is_temporary

__all__ = ["Planner", "Task", "as_block", "batches"]

A_DAY = 86_400


@dataclass(frozen=True)
class Task:
    """One file to restore: ``root`` is the number of the input place that ``path`` is in, ``target`` a path of the
    output place, ``size`` and ``version`` are those of `Entry`."""

    root: int
    path: str
    target: str
    size: int
    version: str


@dataclass
class Planner:
    """Lists inputs and decides what becomes of each.

    Attributes:
        inputs: what was asked for.
        out: the folder of the results.
        format: ``"same"``, or the format of the results.
        overwrite: restore everything again.
        retry_failed: try those again that failed in an earlier run.
        history: what earlier runs did.
        on_record: gets the record of each input that is done without being restored: its output is there, or it cannot
            have one.
        listed, finished, failed_before: counts of inputs: all, those that an earlier run has restored, those that it
            could not.
        skipped: examples of files in folders that are no images, and ``skipped_count`` how many there are.
    """

    inputs: Sequence[Place]
    out: Place
    format: str
    overwrite: bool
    retry_failed: bool
    history: History
    on_record: Callable[[Record], None]
    listed: int = 0
    finished: int = 0
    failed_before: int = 0
    skipped: list[str] = field(default_factory=list)
    skipped_count: int = 0

    def tasks(self) -> Iterator[Task]:
        """The files to restore, in the order of the listings."""
        taken: set[bytes] = set()
        there = self._outputs()
        for root, place in enumerate(self.inputs):
            for entry in self._images(place):
                self.listed += 1
                target = self.out.below(_renamed(entry.place, self.format))
                key = digest(target)
                task = Task(root, entry.path, target, entry.size, entry.version)
                if key in taken:
                    self._fail(place, task, f"its output {self.out.name(target)} is already that of another input")
                    continue
                taken.add(key)
                if place.fs is self.out.fs and _same(entry.path, target):
                    self._fail(place, task, "refusing to overwrite an input")
                elif self._is_to_do(place, entry, task, key in there):
                    yield task

    def _is_to_do(self, place: Place, entry: Entry, task: Task, is_there: bool) -> bool:
        if self.overwrite:
            return True
        name = place.name(entry.path)
        if self.history.is_done(name, entry):
            self.finished += 1
            return False
        if self.history.is_failed(name, entry):
            self.failed_before += not self.retry_failed
            return self.retry_failed
        if is_there and not self.history.is_known(name):
            self.on_record(self._record(place, task, PRESENT, None))
            return False
        return True

    def _images(self, place: Place) -> Iterator[Entry]:
        """The image files of an input; of a file that was named itself, that file whatever its name."""
        inside = f"{self.out.root}/" if place.fs is self.out.fs and self.out.root != place.root else None
        for entry in place.entries():
            name = posixpath.basename(entry.path)
            if entry.path == place.root or (
                posixpath.splitext(name)[1].lower() in SUFFIXES
                and not name.startswith("._")
                and not (inside and entry.path.startswith(inside))
            ):
                yield entry
            elif not (is_temporary(name) or (inside and entry.path.startswith(inside))):
                self.skipped_count += 1
                if len(self.skipped) < 5:
                    self.skipped.append(place.name(entry.path))

    def _outputs(self) -> set[bytes]:
        """Digests of what is in the output folder already; temporaries that a writer left days ago are removed."""
        there: set[bytes] = set()
        if self.overwrite or not self.out.fs.exists(self.out.root):
            return there
        for entry in self.out.entries():
            if not is_temporary(entry.place):
                there.add(digest(entry.path))
            elif self.out.is_local and time.time() - int(entry.version) / 1e9 > A_DAY:
                self.out.remove(entry.path)
        return there

    def _fail(self, place: Place, task: Task, error: str) -> None:
        self.on_record(self._record(place, task, FAILED, error))

    def _record(self, place: Place, task: Task, status: str, error: str | None) -> Record:
        names = (place.name(task.path), self.out.name(task.target))
        return Record(*names, status, error=error, size=task.size, version=task.version)


def batches(tasks: Iterator[Task], files: int, size: int) -> Iterator[list[Task]]:
    """Tasks in batches of about the same work: ``files`` of them, or fewer whose sizes sum up to ``size`` bytes."""
    batch: list[Task] = []
    total = 0
    for task in tasks:
        if batch and (len(batch) == files or total + max(task.size, 0) > size):
            yield batch
            batch, total = [], 0
        batch.append(task)
        total += max(task.size, 0)
    if batch:
        yield batch


def as_block(batch: list[Task], first: int) -> Any:
    """A batch as a table of one row, whose files are numbered from ``first`` on: ``tasks``, a list of structs."""
    import pyarrow as pa

    return pa.table({"tasks": [[{"index": first + i, **asdict(task)} for i, task in enumerate(batch)]]})


def _renamed(place: str, format: str) -> str:
    stem, suffix = posixpath.splitext(place)
    if format == "same" or SUFFIXES.get(suffix.lower()) == format:
        return place
    return stem + FORMATS[format]


def _same(path: str, other: str) -> bool:
    return posixpath.normpath(path) == posixpath.normpath(other)
