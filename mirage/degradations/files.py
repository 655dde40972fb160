"""Pairs of clean and degraded files, with the parameters of each degraded one beside them: ``mirage degrade``.

    DIR/clean/NAME.png   DIR/degraded/NAME.png        one kind
    DIR/clean/NAME.png   DIR/KIND/NAME.png   ...      several, in the layout of CDD11
    DIR/parameters.json  DIR/parameters.csv

What a file gets depends on the seed, its name and the kind, and on nothing that is done besides.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mirage.degradations import generator_of
from mirage.degradations.base import Applied, Degradation, draw_whole
from mirage.images import ImageError, ImageFile, read_image, write_image
from mirage.inputs import is_below
from mirage.whole_files import write_whole

__all__ = ["Counts", "Failed", "Pairs", "SettingsDiffer", "degrade_files", "described", "read_pixels"]

FORMAT = "mirage degradations, version 1"
SECONDS_BETWEEN_WRITES = 10.0
BESIDE = ("image", "source", "top", "left", "height", "width", "clean", "degraded", "kind")
"""Columns of the CSV before the parameters."""


class SettingsDiffer(ValueError):
    """The folder holds pairs of other settings."""


@dataclass(frozen=True)
class Pairs:
    """What to make of each image.

    Attributes:
        kinds: the degradations, by the name of their folder.
        seed: what everything is drawn from.
        crop: side of the square that is cut out of each image, at a place that is drawn; None: the whole image.
        maps: folders of maps by what they are (``depth``, ...): pictures of the images' names and sizes.
    """

    kinds: Mapping[str, Degradation]
    seed: int = 0
    crop: int | None = None
    maps: Mapping[str, Path] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        kinds = {name: repr(each) for name, each in self.kinds.items()}
        return {"seed": self.seed, "crop": self.crop, "kinds": kinds, "maps": {k: str(v) for k, v in self.maps.items()}}

    def folder(self, kind: str) -> str:
        """Where the degraded images of a kind lie."""
        return "degraded" if len(self.kinds) == 1 else kind


@dataclass(frozen=True)
class Failed:
    """A file of which no pairs were made, and why."""

    source: Path
    error: str


@dataclass
class Counts:
    """What became of the files."""

    degraded: int = 0
    finished: int = 0
    failed: list[Failed] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def degrade_files(
    inputs: Iterable[str | Path],
    out_dir: str | Path,
    pairs: Pairs,
    *,
    overwrite: bool = False,
    on_step: Callable[[int, int, str], None] | None = None,
    counts: Counts | None = None,
) -> Counts:
    """Write pairs of every image among ``inputs`` (files, and folders that are searched through) as 8-bit PNG.

    Each file appears whole or not at all. What an earlier run with the same settings has finished, of files that have
    not changed, is left alone. Metadata and alpha are not carried over, grey becomes RGB.

    Args:
        overwrite: begin anew whatever the folder's ``parameters.json`` says.
        on_step: called with how many files are done, how many there are, and the next one's name.
        counts: what is counted in, for those who want to know after an interruption.

    Raises:
        SettingsDiffer: the folder holds pairs of other settings.
    """
    from mirage.restore.files import collect_jobs

    out = Path(out_dir)
    counts = Counts() if counts is None else counts
    skipped = counts.skipped
    jobs = collect_jobs(inputs, out / "clean", "png", lambda path, reason: skipped.append((path, reason)))
    jobs = [job for job in jobs if job.error is not None or not is_below(job.source, out)]
    records = _Records(out, pairs, overwrite)
    try:
        for done, job in enumerate(jobs):
            name = job.target.relative_to(out / "clean").with_suffix("").as_posix()
            if on_step is not None:
                on_step(done, len(jobs), name)
            if job.error is None and records.is_finished(name, job.source):
                counts.finished += 1
                continue
            try:
                if job.error is not None:
                    raise ImageError(job.error)
                records.add(name, _write_pairs(job.source, name, out, pairs))
                counts.degraded += 1
            except (OSError, ValueError, MemoryError) as error:  # the others are still done
                counts.failed.append(Failed(job.source, str(error) or type(error).__name__))
        if on_step is not None:
            on_step(len(jobs), len(jobs), "")
    finally:
        records.write()  # an interrupted run goes on from here
    return counts


def _write_pairs(source: Path, name: str, out: Path, pairs: Pairs) -> dict[str, Any]:
    """Write the files of one image; its entry in the records."""
    stamp = _stamp(source)
    pixels = read_pixels(source)
    maps = {kind: _read_map(folder, name, pixels.shape[:2]) for kind, folder in pairs.maps.items()}
    height, width = pixels.shape[:2]
    top = left = 0
    if pairs.crop is not None:
        if min(height, width) < pairs.crop:
            raise ImageError(f"{width}x{height} pixels are smaller than the crop of {pairs.crop}")
        place = generator_of(pairs.seed, name)
        top, left = draw_whole(place, (0, height - pairs.crop)), draw_whole(place, (0, width - pairs.crop))
        height = width = pairs.crop
    window = np.s_[top : top + height, left : left + width]
    batch = np.ascontiguousarray(pixels[window].transpose(2, 0, 1)[None])
    cut = {kind: np.ascontiguousarray(one[window][None, None]) for kind, one in maps.items()}
    _write(out / "clean" / f"{name}.png", batch)
    kinds: dict[str, Any] = {}
    for kind, degradation in pairs.kinds.items():
        given = {key: one for key, one in cut.items() if key in degradation.takes}
        degraded, applied = degradation(batch, generator_of(pairs.seed, f"{kind}/{name}"), given)
        _write(out / pairs.folder(kind) / f"{name}.png", degraded)
        kinds[kind] = applied[0].as_dict()
    return {"source": str(source), "stamp": stamp, "top": top, "left": left, "height": height, "width": width,
            "kinds": kinds}  # fmt: skip


def read_pixels(path: Path) -> np.ndarray:
    """An image file as ``[H, W, 3]``, float32 in [0, 1], rounded to 8 bits: grey in all channels, alpha left out.

    Raises:
        ImageError: it cannot be read.
    """
    colours = read_image(path).colours()
    levels = np.rint(np.clip(np.broadcast_to(colours, (*colours.shape[:2], 3)) * 255, 0, 255))
    return levels.astype(np.float32) / np.float32(255)


def _read_map(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The map of an image, ``[H, W]`` in [0, 1] in its own depth; colours are averaged."""
    from mirage.images import SUFFIXES

    place = folder / name
    found = [place.with_name(place.name + suffix) for suffix in SUFFIXES]
    path = next((each for each in found if each.is_file()), None)
    if path is None:
        raise ImageError(f"no map for it in {folder}: looked for {place.name} with the suffix of an image")
    colours = read_image(path).colours()
    if colours.shape[:2] != shape:
        sizes = [f"{width}x{height}" for height, width in (colours.shape[:2], shape)]
        raise ImageError(f"its map {path} has {sizes[0]} pixels, it has {sizes[1]}")
    return np.clip(colours.mean(2), 0, 1).astype(np.float32)


def _write(path: Path, batch: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.rint(batch[0] * 255).astype(np.uint8).transpose(1, 2, 0)
    write_image(path, ImageFile(np.ascontiguousarray(pixels)), "png")


def _stamp(source: Path) -> str:
    """What tells whether a file is that of an earlier run."""
    found = source.stat()
    return f"{found.st_size}:{found.st_mtime_ns}"


class _Records:
    """The parameters of all files, and the two files they are kept in."""

    def __init__(self, out: Path, pairs: Pairs, overwrite: bool) -> None:
        self.out, self.pairs = out, pairs
        self.images: dict[str, Any] = {}
        self._due = time.monotonic() + SECONDS_BETWEEN_WRITES
        path = out / "parameters.json"
        if path.exists() and not overwrite:
            self._load(path)

    def _load(self, path: Path) -> None:
        hint = "name another folder, or overwrite it"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise SettingsDiffer(f"{path} is none of this version; {hint}")
            for name, value in self.pairs.settings().items():
                if content["settings"].get(name) != value:
                    found = content["settings"].get(name)
                    raise SettingsDiffer(f"{path} holds pairs with {name} {found!r}, these have {value!r}; {hint}")
            self.images = dict(content["images"])
        except SettingsDiffer:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsDiffer(f"{path} cannot be read: {error}; {hint}") from error

    def is_finished(self, name: str, source: Path) -> bool:
        """Whether the files of an image are there, made of what the source is now."""
        entry = self.images.get(name)
        folders = ["clean", *(self.pairs.folder(kind) for kind in self.pairs.kinds)]
        return (
            entry is not None
            and entry.get("stamp") == _stamp(source)
            and all((self.out / folder / f"{name}.png").is_file() for folder in folders)
        )

    def add(self, name: str, entry: dict[str, Any]) -> None:
        self.images[name] = entry
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write both files, each whole or not at all."""
        if not self.images:
            return
        begin = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "settings": self.pairs.settings(), "images": self.images}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_whole(self.out / "parameters.json", text.encode("utf-8"))
        write_whole(self.out / "parameters.csv", self._table().encode("utf-8"))
        now = time.monotonic()  # of a long list, the writing itself takes a twentieth of the time at most
        self._due = now + max(SECONDS_BETWEEN_WRITES, 20 * (now - begin))

    def _table(self) -> str:
        """A line for each degraded file; lists, as the steps of a composition, are JSON."""
        lines = []
        for name, entry in self.images.items():
            for kind, record in entry["kinds"].items():
                files = {"clean": f"clean/{name}.png", "degraded": f"{self.pairs.folder(kind)}/{name}.png"}
                lines.append({"image": name, **entry, **files, **record, "kind": kind})
        names = dict.fromkeys(key for line in lines for key in line if key not in (*BESIDE, "kinds", "stamp"))
        text = io.StringIO()
        writer = csv.DictWriter(text, [*BESIDE, *names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for line in lines:
            flat = {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in line.items()}
            writer.writerow(flat)
        return text.getvalue()


def described(applied: Applied) -> str:
    """The drawn parameters in a line, for people: seeds and fixed settings left out."""
    steps: Sequence[Mapping[str, Any]] = applied.values.get("steps") or (applied.values,)
    hidden = ("seed", "rounded", "kind", "size", "subsampling", "antialias", "ramp")
    texts = []
    for key, value in ((key, value) for step in steps for key, value in step.items() if key not in hidden):
        if isinstance(value, bool):
            texts.append(key if value else f"not {key}")
        elif isinstance(value, list):
            texts.append(f"{len(value)} {key}")
        else:
            texts.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(texts)
