"""Files restored by the networks of their groups, with a record of each file's group and distance.

The records are lines of JSON in ``groups.jsonl``, one as each file is done; the first one says of which groups.
``groups.csv`` is a table of them all.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirage.images import decode_image, read_bytes
from mirage.restore.files import FileOptions, Job, Outcome, collect_jobs, is_finished, restore_each
from mirage.whole_files import write_whole

if TYPE_CHECKING:
    from mirage.grids.restorer import Choice, GroupedRestorer

__all__ = ["CSV", "LEDGER", "GroupedOutcome", "restore_grouped"]

FORMAT = "mirage grouped results, version 1"
LEDGER, CSV = "groups.jsonl", "groups.csv"
COLUMNS = ("source", "target", "group", "kl", "distance", "foreign")


@dataclass(frozen=True)
class GroupedOutcome(Outcome):
    """What became of a file: an `mirage.restore.Outcome`, and the file's group.

    Attributes:
        choice: the group, its distance, and whether the image is foreign to all; None where there was an error before.
    """

    choice: Choice | None = None


def restore_grouped(
    restorer: GroupedRestorer,
    inputs: Iterable[Path],
    out_dir: Path,
    overwrite: bool,
    on_skip: Callable[[Path, str], None] | None,
    options: Mapping[str, Any],
) -> Iterator[GroupedOutcome]:
    """What `GroupedRestorer.files` does; what is wrong with arguments and folder is raised at once."""
    file_options = FileOptions(overwrite=overwrite, **options)
    jobs = collect_jobs(inputs, out_dir, file_options.format, on_skip)
    ledger = _Ledger(out_dir, restorer.fingerprint, overwrite)
    return _each(restorer, jobs, file_options, ledger)


def _each(
    restorer: GroupedRestorer, jobs: Iterable[Job], options: FileOptions, ledger: _Ledger
) -> Iterator[GroupedOutcome]:
    try:
        for job in jobs:
            outcome = _one(restorer, job, options, ledger.find(job))
            if outcome.choice is not None and outcome.error is None:
                ledger.add(outcome)
            yield outcome
    finally:
        ledger.write_table()


def _one(restorer: GroupedRestorer, job: Job, options: FileOptions, known: Choice | None) -> GroupedOutcome:
    chosen: list[Choice] = []

    def restore(pixels: np.ndarray, note: Callable[[str], None]) -> np.ndarray:
        chosen.append(restorer.select(pixels))
        if chosen[0].foreign:
            note(f"foreign: lies {chosen[0].distance:.2f} from the nearest group, {chosen[0].group}")
        return restorer.restore(pixels, chosen[0]).image

    [outcome] = restore_each([job], restore, options)
    if outcome.skipped and known is not None:
        chosen.append(known)
    elif outcome.skipped:  # finished, and stopped before that was recorded
        try:
            chosen.append(restorer.select(decode_image(read_bytes(job.source), max_pixels=options.max_pixels).pixels))
        except (OSError, ValueError) as error:
            outcome = replace(outcome, error=f"{type(error).__name__}: {error}", skipped=False)
    return GroupedOutcome(**_fields(outcome), choice=chosen[0] if chosen else None)


def _fields(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}


class _Ledger:
    """The records of a folder, by target.

    Raises:
        ValueError: they are of other groups, and ``overwrite`` is not set; or the file is none of records.
    """

    def __init__(self, folder: Path, fingerprint: str, overwrite: bool) -> None:
        self.path, self.fingerprint = folder / LEDGER, fingerprint
        self.records: dict[str, dict[str, Any]] = {}
        lines = self._lines()
        if lines and lines[0].get("groups") == fingerprint and lines[0].get("format") == FORMAT:
            self.records = {record["target"]: record for record in lines[1:]}
        elif lines and not overwrite:
            raise ValueError(
                f"{self.path}: has results of other groups or weights; name another folder, or overwrite them"
            )
        self._begin(len(lines) > len(self.records) + 1 or not self.records)

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines of the file; one that was being written when a process ended is left out."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        try:
            lines = [json.loads(line) for line in text.split("\n")[:-1] if line]
            if not all(isinstance(line, dict) for line in lines) or any("target" not in line for line in lines[1:]):
                raise ValueError("expected an object with a target in each line")
        except ValueError as error:
            raise ValueError(f"{self.path}: not readable as records of results: {error}") from error
        return lines

    def _begin(self, anew: bool) -> None:
        """Write the file again without what does not count, and without a half line."""
        if not anew and self.path.exists() and self.path.read_bytes().endswith(b"\n"):
            return
        head = {"format": FORMAT, "groups": self.fingerprint}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in (head, *self.records.values()))
        write_whole(self.path, text.encode("utf-8"))

    def find(self, job: Job) -> Choice | None:
        """What the record of a finished job says."""
        from mirage.grids.restorer import Choice

        record = self.records.get(str(job.target))
        if record is None or not is_finished(job):
            return None
        return Choice(**{name: record[name] for name in Choice.__dataclass_fields__})

    def add(self, outcome: GroupedOutcome) -> None:
        """Add a line, at once."""
        assert outcome.choice is not None
        record = {"source": str(outcome.source), "target": str(outcome.target), **asdict(outcome.choice)}
        if self.records.get(record["target"]) == record:
            return
        self.records[record["target"]] = record
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_table(self) -> None:
        """Write all records as CSV."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records[target] for target in sorted(self.records))
        write_whole(self.path.with_name(CSV), text.getvalue().encode("utf-8"))
