"""The loop of an evaluation: every image of every set through every method, and the averages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirage.evaluate.methods import Method
from mirage.evaluate.metrics import DEFAULT, METRICS, measure, metric
from mirage.evaluate.noise import KINDS, add_noise, noise_generator
from mirage.evaluate.results import Failure, Results, Row
from mirage.evaluate.sets import ImageSet, Item
from mirage.images import read_image
from mirage.wording import counted

__all__ = ["CROP", "SIGMAS", "Average", "Evaluation", "Task", "crop_to_multiple", "evaluate", "prepare",
           "read_rgb"]  # fmt: skip

CROP = 16
"""The released evaluation cuts images to multiples of this, around their centre; CDD11's it leaves whole."""

SIGMAS = (15.0, 25.0, 50.0)


@dataclass(frozen=True)
class Task:
    """A set, and what its images get before they are restored.

    Attributes:
        sigma: of the noise that is added, in units of 1/255, or None.
        kind: the name of the degradation (`mirage.degradations.create`) that clean images get in its place, or None.
    """

    set: ImageSet
    sigma: float | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Average:
    """What a method reached on a set: the average of each metric over ``images`` of ``of`` images."""

    method: str
    set: str
    sigma: float | None
    images: int
    of: int
    values: dict[str, float]
    seconds: float
    kind: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """All that came of an evaluation.

    Attributes:
        settings: seed, generator, noise, crop.
        metrics: their definitions by name.
        methods: their definitions by label.
        averages: one for each method and task.
        rows: one for each method, task and image.
        failures: images that could not be evaluated.
        notes: sets, files and methods that were left out, and why.
    """

    settings: dict[str, Any]
    metrics: dict[str, str]
    methods: dict[str, str]
    averages: tuple[Average, ...]
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]


def evaluate(
    tasks: Iterable[Task],
    methods: Sequence[Method],
    *,
    metrics: Sequence[str] = DEFAULT,
    seed: int = 0,
    noise: str = "float",
    crop: int = CROP,
    limit: int | None = None,
    path: str | Path | None = None,
    overwrite: bool = False,
    sheets: str | Path | None = None,
    on_step: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Measure ``methods`` on ``tasks``.

    Args:
        metrics: keys of `METRICS`.
        seed: of the noise; see `noise_generator`.
        noise: a key of `KINDS`.
        crop: images are cut to multiples of this around their centre, before noise is added; 0 leaves them whole.
        limit: take only the first images of each set.
        path: the JSON file to keep results in; those of the same settings that it holds are not computed again.
        overwrite: begin it anew.
        sheets: folder for pictures of input, restored image, target and error, one for each row.
        on_step: called with how many rows are done, how many there are, and which is next.

    Raises:
        ValueError: an unknown metric or kind of noise, two methods of one label, or two sets or tasks of one name.
        SettingsDiffer: the file at ``path`` holds another evaluation.
    """
    tasks = list(tasks)
    chosen = [metric(name) for name in metrics]
    settings = _settings(seed, noise, crop)
    _refuse_twins("methods", [method.label for method in methods])
    _refuse_twins("sets", [each.name for each in _sets(tasks)])
    _refuse_twins("tasks", [_title(task) for task in tasks])
    results = Results(path, settings, overwrite=overwrite)
    for method in methods:
        results.declare(method.label, method.definition, method.identity())
    loop = _Loop(results, methods, metrics, seed, noise, crop, Path(sheets) if sheets is not None else None)
    steps = [(task, item) for task in tasks for item in task.set.items[:limit]]
    try:
        for done, (task, item) in enumerate(steps):
            if on_step is not None:
                on_step(done, len(steps), f"{_title(task)} {item.name}")
            loop.one(task, item)
        if on_step is not None:
            on_step(len(steps), len(steps), "")
    except BaseException:
        results.write()  # an interrupted evaluation goes on from here
        raise
    averages = [each for task in tasks for method in methods if (each := loop.average(task, method, limit)) is not None]
    evaluation = Evaluation(
        settings=settings,
        metrics={entry.name: entry.definition for entry in chosen},
        methods={method.label: method.definition for method in methods},
        averages=tuple(averages),
        rows=tuple(loop.rows),
        failures=tuple(loop.failures),
        notes=tuple(dict.fromkeys([*_left_out(tasks), *loop.notes])),
    )
    results.more = {
        "metrics": evaluation.metrics,
        "averages": [vars(each) for each in evaluation.averages],
        "failures": [vars(each) for each in evaluation.failures],
        "notes": list(evaluation.notes),
    }
    results.write()
    return evaluation


class _Loop:
    """What an evaluation holds while it runs."""

    def __init__(self, results: Results, methods: Sequence[Method], metrics: Sequence[str], seed: int, noise: str,
                 crop: int, sheets: Path | None) -> None:  # fmt: skip
        self.results, self.methods, self.metrics = results, methods, metrics
        self.seed, self.noise, self.crop, self.sheets = seed, noise, crop, sheets
        self.rows: list[Row] = []
        self.failures: list[Failure] = []
        self.notes: list[str] = []

    def one(self, task: Task, item: Item) -> None:
        """One image through every method that has not restored it yet."""
        stamp = _stamp(item, task.kind)
        pair: tuple[np.ndarray, np.ndarray] | None = None
        for method in self.methods:
            if method.needs_sigma and task.sigma is None:
                self.notes.append(f"{method.label} left out of {_title(task)}: it removes noise of known sigma")
                continue
            sheet = self._sheet(task, item, method)
            key = (method.label, task.set.name, task.sigma, task.kind, item.name)
            row = self.results.find(key, stamp, self.metrics)
            if row is None or (sheet is not None and not sheet.exists()):
                try:
                    pair = self._prepare(task, item) if pair is None else pair
                    row = self._measure(task, item, method, pair, stamp, sheet)
                except (OSError, ValueError, RuntimeError, MemoryError) as error:  # the others are still evaluated
                    what = str(error) or type(error).__name__
                    self.failures.append(Failure(method.label, task.set.name, task.sigma, item.name, what, task.kind))
                    continue
                self.results.add(row)
            self.rows.append(row)

    def _prepare(self, task: Task, item: Item) -> tuple[np.ndarray, np.ndarray]:
        return prepare(item, task.sigma, self.seed, self.noise, self.crop, task.kind)

    def _measure(self, task: Task, item: Item, method: Method, pair: tuple[np.ndarray, np.ndarray], stamp: str,
                 sheet: Path | None) -> Row:  # fmt: skip
        degraded, target = pair
        began = time.perf_counter()
        restored = method(degraded, task.sigma)
        seconds = time.perf_counter() - began
        values = measure(target, restored, self.metrics)
        if sheet is not None:
            from mirage.evaluate.sheets import draw_sheet

            draw_sheet(sheet, degraded, restored, target, f"{_title(task)}  {item.name}", method.label)
        height, width = target.shape[:2]
        return Row(method.label, task.set.name, task.sigma, item.name, height, width, values, round(seconds, 4), stamp,
                   task.kind)  # fmt: skip

    def _sheet(self, task: Task, item: Item, method: Method) -> Path | None:
        if self.sheets is None:
            return None
        noise = () if task.sigma is None else (f"sigma{task.sigma:g}",)
        kind = () if task.kind is None else (task.kind,)
        folder = self.sheets.joinpath(task.set.name, *noise, *kind)
        return folder / f"{item.name.replace('/', '_')}_{method.label.replace('/', '_')}.png"

    def average(self, task: Task, method: Method, limit: int | None) -> Average | None:
        """Over the images that were evaluated; None where there is none."""
        rows = [row for row in self.rows if row.key[:4] == (method.label, task.set.name, task.sigma, task.kind)]
        if not rows:
            return None
        values = {name: METRICS[name].average([row.values[name] for row in rows]) for name in self.metrics}
        seconds = float(np.mean([row.seconds for row in rows]))
        total = len(task.set.items[:limit])
        return Average(method.label, task.set.name, task.sigma, len(rows), total, values, seconds, task.kind)


def prepare(item: Item, sigma: float | None, seed: int = 0, noise: str = "float", crop: int = CROP,
            kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Input and target of one image.

    Args:
        kind: of the degradation that a clean image gets, drawn from ``seed``, ``kind`` and the image's name, in the
            place of noise.

    Returns:
        Two arrays ``[H, W, 3]``, float32 in [0, 1]: grey images as three equal channels, without alpha, cut to
        multiples of ``crop``; the input is the file of that name, or the target with noise or a degradation.

    Raises:
        ImageError: a file that cannot be read.
        ValueError: input and target have different sizes, or the image is smaller than ``crop``.
    """
    target = crop_to_multiple(read_rgb(item.target), crop)
    if kind is not None:
        if item.input is not None or sigma is not None:
            raise ValueError(f"kind {kind} goes with clean images, without an input or sigma")
        return _degraded(target, kind, seed, item.name), target.astype(np.float32)
    if item.input is not None:
        degraded = crop_to_multiple(read_rgb(item.input), crop)
        if degraded.shape != target.shape:
            sizes = [f"{x.shape[1]}x{x.shape[0]}" for x in (degraded, target)]
            raise ValueError(f"input and target have different sizes: {' and '.join(sizes)}")
        if sigma is not None:
            degraded = add_noise(degraded, sigma, noise_generator(seed, item.name), noise)
    elif sigma is None:
        raise ValueError("an image without an input needs a sigma")
    else:
        degraded = add_noise(target, sigma, noise_generator(seed, item.name), noise)
    return degraded.astype(np.float32), target.astype(np.float32)


def _degraded(target: np.ndarray, kind: str, seed: int, name: str) -> np.ndarray:
    """What `mirage degrade` makes of an image of this name: its result is rounded to 8 bits."""
    from mirage.degradations import create, generator_of

    degradation = create(kind)
    batch = np.ascontiguousarray(target.astype(np.float32).transpose(2, 0, 1)[None])
    degraded, _ = degradation(batch, generator_of(seed, f"{degradation.label}/{name}"))
    return degraded[0].transpose(1, 2, 0)


def crop_to_multiple(image: np.ndarray, multiple: int) -> np.ndarray:
    """``[H, W, C]`` cut to multiples of ``multiple``: what is too much goes half above and left (rounded down), the
    rest below and right; 0 leaves the image whole.

    Raises:
        ValueError: a side is shorter than ``multiple``.
    """
    if multiple <= 1:
        return image
    height, width = (size - size % multiple for size in image.shape[:2])
    if not height or not width:
        raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels cannot be cut to multiples of {multiple}")
    top, left = (size % multiple // 2 for size in image.shape[:2])
    return image[top : top + height, left : left + width]


def read_rgb(path: Path) -> np.ndarray:
    """An image file as ``[H, W, 3]``, float64 in [0, 1]: grey in all three channels, alpha left out.

    Raises:
        ImageError: it cannot be read.
    """
    colours = read_image(path).colours()
    return np.broadcast_to(colours, (*colours.shape[:2], 3))


def _settings(seed: int, noise: str, crop: int) -> dict[str, Any]:
    if noise not in KINDS:
        raise ValueError(f"noise: expected one of {', '.join(KINDS)}, got {noise!r}")
    return {
        "seed": seed,
        "generator": "numpy.random.default_rng([seed, zlib.crc32(image name)]).standard_normal, per image",
        "noise": f"{noise}: {KINDS[noise]}",
        "crop": crop,
    }


def _stamp(item: Item, kind: str | None) -> str:
    """What tells whether an image's files, and the ranges of its degradation, are those of an earlier run."""
    files = [path.stat() for path in (item.target, item.input) if path is not None and path.exists()]
    stamps = [f"{each.st_size}:{each.st_mtime_ns}" for each in files]
    if kind is not None:
        from mirage.degradations import create

        stamps.append(repr(create(kind)))
    return " ".join(stamps)


def _title(task: Task) -> str:
    noise = "" if task.sigma is None else f" sigma {task.sigma:g}"
    return f"{task.set.name}{noise}{'' if task.kind is None else f' {task.kind}'}"


def _refuse_twins(what: str, names: Sequence[str]) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise ValueError(f"{what}: expected different names, got more than one {', '.join(twins)}")


def _sets(tasks: Sequence[Task]) -> list[ImageSet]:
    return list({id(task.set): task.set for task in tasks}.values())


def _left_out(tasks: Sequence[Task], listed: int = 3) -> list[str]:
    notes = []
    for each in _sets(tasks):
        if each.skipped:
            names = [f"{path.name} ({reason})" for path, reason in each.skipped[:listed]]
            names += [f"and {len(each.skipped) - listed} more"] if len(each.skipped) > listed else []
            notes.append(f"{counted(len(each.skipped), 'file')} of {each.name} left out: {', '.join(names)}")
    return notes
