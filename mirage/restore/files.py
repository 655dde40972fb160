"""Image files and folders: which to restore and where to, one after the other, each whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from mirage.images import (
    FORMATS,
    MAX_PIXELS,
    SUFFIXES,
    ImageError,
    ImageHeader,
    check_size,
    check_writable,
    decode_image,
    read_bytes,
    read_header,
    write_image,
)
from mirage.inputs import is_below, photographs_in
from mirage.restore.budget import NotEnoughMemory, check_memory, release_memory
from mirage.restore.pixels import restore_array

__all__ = ["FileOptions", "Job", "Outcome", "collect_jobs", "is_finished", "restore_each", "restore_files"]

Restore = Callable[[np.ndarray, Callable[[str], None]], np.ndarray]


@dataclass(frozen=True)
class Job:
    """One file to restore: ``source`` -> ``target``, or the ``error`` that already forbids it."""

    source: Path
    target: Path
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one :class:`Job`.

    Attributes:
        error: None where ``target`` is there.
        notes: what of the file's metadata could not be read or carried over, and where memory ran out.
        skipped: ``target`` was there already, from an earlier run.
        seconds: that it took.
    """

    source: Path
    target: Path
    error: str | None = None
    notes: tuple[str, ...] = ()
    skipped: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class FileOptions:
    """How files are read and written.

    Attributes:
        format: ``"same"`` keeps what each file is, its bit depth too; a key of `mirage.images.FORMATS` converts.
        quality: of the JPEG, WebP, AVIF and HEIC files written, 1 to 100.
        max_pixels: an image with more pixels is refused.
        overwrite: restore again what is finished; see `is_finished`.
    """

    format: str = "same"
    quality: int = 95
    max_pixels: int = MAX_PIXELS
    overwrite: bool = False


def collect_jobs(
    inputs: Iterable[str | Path],
    out_dir: str | Path,
    format: str = "same",
    on_skip: Callable[[Path, str], None] | None = None,
) -> list[Job]:
    """List what to restore and where to, without reading more of a file than its first bytes.

    A file goes to ``out_dir`` under its own name; a folder is searched through for image files, which keep their
    places below it. ``format`` is ``"same"`` or a key of `FORMATS` and sets the suffix. A job carries an error in
    the place of being done where its input does not exist, is a folder without images, or where its target is one of
    the inputs or the target of an earlier job.

    Args:
        on_skip: called with each file of a folder that looks like a picture and is not restored, and why: other
            formats, sidecars of macOS (``._a.jpg``), links to nothing.

    Raises:
        ValueError: ``format`` is unknown.
    """
    if format != "same" and format not in FORMATS:
        raise ValueError(f"format: expected same, {', '.join(FORMATS)}, got {format!r}")
    out_dir = Path(out_dir)
    jobs: list[Job] = []
    for given in map(Path, inputs):
        try:
            found = _expand(given, out_dir, on_skip or (lambda *_: None))
            jobs += [Job(source, _target(out_dir / place, format)) for source, place in found]
        except FileNotFoundError as error:
            jobs.append(Job(given, out_dir / given.name, str(error)))
    return _refuse_collisions(jobs)


def _refuse_collisions(pairs: list[Job]) -> list[Job]:
    """Mark the jobs that would write over an input or over another job's output; drop a file named twice."""
    identities = {_identity(job.source) for job in pairs} - {None}
    taken: dict[Path, Path] = {}
    jobs = []
    for job in pairs:
        source, target, error = job.source, job.target, job.error
        where = target.resolve()
        if error is None and _identity(target) in identities:
            error = f"refusing to overwrite an input: {target}"
        elif where in taken and taken[where] != source.resolve():
            error = f"its output {target} is already that of {taken[where]}"
        elif where in taken:
            continue  # the same file named twice
        taken.setdefault(where, source.resolve())
        jobs.append(Job(source, target, error))
    return jobs


def is_finished(job: Job) -> bool:
    """Whether an earlier run has done this job: its target is a file, and not older than its source.

    Targets appear under their names only when they are complete, so one that is there is whole.
    """
    try:
        source, target = job.source.stat(), job.target.stat()
    except OSError:
        return False
    return job.target.is_file() and target.st_size > 0 and target.st_mtime_ns >= source.st_mtime_ns


def restore_files(
    model: nn.Module,
    jobs: Sequence[Job],
    *,
    format: str = "same",
    quality: int = 95,
    max_pixels: int = MAX_PIXELS,
    check_memory: bool = True,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Restore every job's file in one pass; one that fails is reported in its :class:`Outcome` and does not stop the
    others. Earlier results are replaced. `mirage.Restorer.files` does more.

    Args:
        format, quality, max_pixels: as of :class:`FileOptions`.
        check_memory: refuse an image that takes more memory than is available, before it takes it; see
            `needed_memory` and `mirage.memory`.
        on_done: called with each outcome as it comes.
    """
    check = _memory_check(model) if check_memory else None
    options = FileOptions(format, quality, max_pixels, overwrite=True)
    outcomes = []
    for outcome in restore_each(jobs, lambda pixels, note: restore_array(model, pixels), options, check):
        outcomes.append(outcome)
        if on_done is not None:
            on_done(outcome)
    return outcomes


def _memory_check(model: nn.Module) -> Callable[[ImageHeader], None]:
    return lambda header: check_memory(model, header)


def restore_each(
    jobs: Iterable[Job],
    restore: Restore,
    options: FileOptions,
    check: Callable[[ImageHeader], None] | None = None,
) -> Iterator[Outcome]:
    """Do the jobs one after the other.

    Args:
        restore: of the pixels of an image, [H, W, C], uint8 or uint16, makes the restored ones; its second argument
            takes sentences that a user should see.
        check: raises where an image with this header shall not be tried.
    """
    for job in jobs:
        begin = time.perf_counter()
        outcome = Outcome(job.source, job.target, job.error)
        if job.error is None and not options.overwrite and is_finished(job):
            outcome = Outcome(job.source, job.target, skipped=True)
        elif job.error is None:
            outcome = _restore_file(job, restore, options, check, begin)
        if outcome.error is not None:
            release_memory()  # whatever it was: the next file shall not fail for what this one left
        yield outcome


def _restore_file(
    job: Job,
    restore: Restore,
    options: FileOptions,
    check: Callable[[ImageHeader], None] | None,
    begin: float,
) -> Outcome:
    notes: list[str] = []
    error = None
    try:
        data = read_bytes(job.source)
        header = read_header(data)
        check_size(header, options.max_pixels)
        if check is not None:
            check(header)
        image = decode_image(data, max_pixels=options.max_pixels)
        del data
        notes += image.notes
        target = image.format if options.format == "same" else options.format
        check_writable(target, image.pixels.shape[2], *image.pixels.shape[:2])
        restored = image.with_pixels(restore(image.pixels, notes.append))
        del image
        job.target.parent.mkdir(parents=True, exist_ok=True)
        notes += write_image(job.target, restored, target, quality=options.quality)
    except (ImageError, NotEnoughMemory) as caught:
        error = str(caught)
    except Exception as caught:  # whatever one file does to the model or the disk, the others are still tried
        what = str(caught) or ("out of memory" if isinstance(caught, MemoryError) else "no message")
        error = f"{type(caught).__name__}: {what}"
    return Outcome(job.source, job.target, error, tuple(notes), seconds=time.perf_counter() - begin)


def _expand(given: Path, out_dir: Path, skip: Callable[[Path, str], None]) -> list[tuple[Path, Path]]:
    """``(file, its place below the output folder)`` for a file, or for all images in a folder."""
    if given.is_dir():
        inside = out_dir.resolve() == given.resolve()  # then results cannot be told from inputs by their place

        def is_result(path: Path) -> bool:
            return not inside and is_below(path, out_dir)

        files = photographs_in(given, lambda path, reason: None if is_result(path) else skip(path, reason))
        files = [path for path in files if not is_result(path)]
        if not files:
            raise FileNotFoundError("no images in this folder")
        return [(path, path.relative_to(given)) for path in files]
    if not given.exists():
        raise FileNotFoundError("a link to nothing" if given.is_symlink() else "no such file or folder")
    return [(given, Path(given.name))]


def _target(path: Path, format: str) -> Path:
    if format == "same" or SUFFIXES.get(path.suffix.lower()) == format:
        return path
    return path.with_suffix(FORMATS[format])


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells files apart whatever they are called, links included; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
