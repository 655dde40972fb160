"""Files restored by the networks of their groups, with a record of each file's group and distance.

The records are lines of JSON in ``groups.jsonl``, one as each file is done; the first one says of which groups.
``groups.csv`` is a table of them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirage.images import decode_image, read_bytes
from mirage.restore.files import FileOptions, Job, Outcome, collect_jobs, restore_each
from mirage.restore.ledger import Ledger

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
    ledger = Ledger(
        out_dir / LEDGER, format=FORMAT, of="groups", fingerprint=restorer.fingerprint, columns=COLUMNS,
        overwrite=overwrite, what="other groups or weights",
    )  # fmt: skip
    return _each(restorer, jobs, file_options, ledger)


def _each(
    restorer: GroupedRestorer, jobs: Iterable[Job], options: FileOptions, ledger: Ledger
) -> Iterator[GroupedOutcome]:
    try:
        for job in jobs:
            outcome = _one(restorer, job, options, _known(ledger.find(job)))
            if outcome.choice is not None and outcome.error is None:
                ledger.add({"source": str(job.source), "target": str(job.target), **asdict(outcome.choice)})
            yield outcome
    finally:
        ledger.write_table()


def _known(record: Mapping[str, Any] | None) -> Choice | None:
    from mirage.grids.restorer import Choice

    return None if record is None else Choice(**{name: record[name] for name in Choice.__dataclass_fields__})


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
