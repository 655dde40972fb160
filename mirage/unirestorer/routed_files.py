"""Files restored by a tree of experts, with a record of where each file went.

The records are lines of JSON in ``experts.jsonl``, one as each file is done; the first one says of which system.
``experts.csv`` is a table of them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirage.images import decode_image, read_bytes
from mirage.restore.files import FileOptions, Job, Outcome, collect_jobs, restore_each
from mirage.restore.ledger import Ledger

if TYPE_CHECKING:
    from mirage.unirestorer.system import Explanation, UniRestorer

__all__ = ["LEDGER", "RoutedOutcome", "restore_routed"]

FORMAT = "mirage unirestorer results, version 1"
LEDGER = "experts.jsonl"
COLUMNS = ("source", "target", "leaf", "level", "expert", "tasks", "uncertainty", "p_level", "p_leaf")
FILE_OPTIONS = ("format", "quality", "max_pixels")


@dataclass(frozen=True)
class RoutedOutcome(Outcome):
    """What became of a file: an `mirage.restore.Outcome`, and where it went.

    Attributes:
        explanation: leaf, level, expert and probabilities; None where there was an error before.
    """

    explanation: Explanation | None = None


def restore_routed(
    system: UniRestorer,
    inputs: Iterable[Path],
    out_dir: Path,
    task: str | None,
    overwrite: bool,
    on_skip: Callable[[Path, str], None] | None,
    options: Mapping[str, Any],
) -> Iterator[RoutedOutcome]:
    """What `UniRestorer.files` does; what is wrong with arguments and folder is raised at once."""
    of_files = FileOptions(overwrite=overwrite, **{name: options[name] for name in FILE_OPTIONS if name in options})
    of_restorer = {name: value for name, value in options.items() if name not in FILE_OPTIONS}
    jobs = collect_jobs(inputs, out_dir, of_files.format, on_skip)
    ledger = Ledger(
        out_dir / LEDGER, format=FORMAT, of="system", fingerprint=_fingerprint(system, task), columns=COLUMNS,
        overwrite=overwrite, what="another system, task or confidence",
    )  # fmt: skip

    def each() -> Iterator[RoutedOutcome]:
        try:
            for job in jobs:
                outcome = _one(system, job, task, of_files, of_restorer, _known(ledger.find(job)))
                if outcome.explanation is not None and outcome.error is None:
                    ledger.add(_record(job, outcome.explanation))
                yield outcome
        finally:
            ledger.write_table()

    return each()


def _fingerprint(system: UniRestorer, task: str | None) -> str:
    own = f"{system.fingerprint} task={task or 'any'}"
    return own if system.confidence is None else f"{own} confidence={float(system.confidence)!r}"


def _record(job: Job, explanation: Explanation) -> dict[str, Any]:
    found = {"source": str(job.source), "target": str(job.target), **asdict(explanation)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _known(record: Mapping[str, Any] | None) -> Explanation | None:
    from mirage.unirestorer.system import Explanation

    if record is None:
        return None
    values: dict[str, Any] = {each.name: record[each.name] for each in fields(Explanation)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Explanation(**values)


def _one(
    system: UniRestorer, job: Job, task: str | None, of_files: FileOptions, of_restorer: Mapping[str, Any],
    known: Explanation | None,
) -> RoutedOutcome:  # fmt: skip
    chosen: list[Explanation] = []

    def restore(pixels: np.ndarray, note: Callable[[str], None]) -> np.ndarray:
        chosen.append(system.select(pixels, task))
        return system.restore(pixels, task, explanation=chosen[0], **of_restorer).image

    [outcome] = restore_each([job], restore, of_files)
    if outcome.skipped and known is not None:
        chosen.append(known)
    elif outcome.skipped:  # finished, and stopped before that was recorded
        try:
            pixels = decode_image(read_bytes(job.source), max_pixels=of_files.max_pixels).pixels
            chosen.append(system.select(pixels, task))
        except (OSError, ValueError) as error:
            outcome = replace(outcome, error=f"{type(error).__name__}: {error}", skipped=False)
    values = {each.name: getattr(outcome, each.name) for each in fields(Outcome)}
    return RoutedOutcome(**values, explanation=chosen[0] if chosen else None)
