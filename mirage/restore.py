"""Restore image files with a trained model: ``mirage restore``.

The network takes RGB in [0, 1] whose sides are multiples of 8. Here images of any size are padded on the right and at
the bottom and cropped back, grey images are fed as three equal channels and come back as their mean, and an alpha
channel is copied through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mirage.images import FORMATS, SUFFIXES, ImageError, read_image, write_image

__all__ = ["Job", "Outcome", "collect_jobs", "load_model", "pad_to_multiple", "restore_array", "restore_files"]

MULTIPLE = 8
"""The sides of the network's input are multiples of this."""


@dataclass(frozen=True)
class Job:
    """One file to restore: ``source`` -> ``target``, or the ``error`` that already forbids it."""

    source: Path
    target: Path
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one :class:`Job`; ``error`` is None where ``target`` was written."""

    source: Path
    target: Path
    error: str | None = None


def load_model(
    weights: str | Path, *, fast: bool = True, device: str | torch.device = "cpu", key: str | None = None
) -> nn.Module:
    """The model of a checkpoint in evaluation mode on ``device``; with ``fast``, its modules replaced by the fast ones.

    Args:
        key: which network of the file, where it holds several; see ``mirage.from_checkpoint``.

    Raises:
        ValueError, OSError: as ``mirage.from_checkpoint`` does.
    """
    import mirage

    model = mirage.from_checkpoint(weights, key=key).eval().to(device)
    if fast:
        import mirage.fast

        model = mirage.fast.accelerate(model)
    return model


def pad_to_multiple(x: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Pad ``[B, C, H, W]`` on the right and at the bottom until H and W are multiples of ``multiple``.

    By reflection, as far as that goes; along a side not longer than its pad, by replicating the edge.
    """
    for axis, pad_of in ((3, lambda n: (0, n, 0, 0)), (2, lambda n: (0, 0, 0, n))):
        size = x.shape[axis]
        pad = -size % multiple
        if pad:
            x = nn.functional.pad(x, pad_of(pad), mode="reflect" if pad < size else "replicate")
    return x


@torch.inference_mode()
def restore_array(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Restore one image.

    Args:
        model: maps ``[1, 3, H, W]`` in [0, 1], H and W multiples of 8, to the same shape; runs on its own device and
            dtype.
        pixels: ``[H, W, C]``, uint8 or uint16; C is 1, 2, 3 or 4, the last of 2 and 4 being alpha.

    Returns:
        The same shape and type; results outside [0, 1] are clipped, alpha is the input's.

    Raises:
        ValueError: the model returned another shape, or values that are not finite.
    """
    scale = float(np.iinfo(pixels.dtype).max)
    channels = pixels.shape[2]
    colours = channels - (channels in (2, 4))
    parameter = next(model.parameters(), torch.empty(0))
    x = torch.from_numpy(pixels[..., :colours].astype(np.float32) / scale).permute(2, 0, 1)[None]
    x = x.expand(1, 3, -1, -1).to(parameter.device, parameter.dtype)
    padded = pad_to_multiple(x)
    y = model(padded)
    if not isinstance(y, Tensor) or y.shape != padded.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"model: expected an image of shape {list(padded.shape)}, got {got}")
    y = y[0, :, : pixels.shape[0], : pixels.shape[1]].double()
    if not torch.isfinite(y).all():
        raise ValueError("the model's output has values that are not finite")
    y = y.mean(0, keepdim=True) if colours == 1 else y
    restored = (y.clamp(0, 1) * scale).round().permute(1, 2, 0).cpu().numpy().astype(pixels.dtype)
    return np.concatenate([restored, pixels[..., colours:]], axis=2)


def collect_jobs(inputs: Iterable[str | Path], out_dir: str | Path, format: str = "same") -> list[Job]:
    """List what to restore and where to, without opening a file.

    A file goes to ``out_dir`` under its own name; a folder is searched through for PNG and JPEG files, which keep their
    places below it. ``format`` is ``"same"``, ``"png"`` or ``"jpeg"`` and sets the suffix. A job carries an error in
    the place of being done where its input does not exist, is a folder without images, or where its target is one of
    the inputs or the target of an earlier job.

    Raises:
        ValueError: ``format`` is unknown.
    """
    if format != "same" and format not in FORMATS:
        raise ValueError(f"format: expected same, {', '.join(FORMATS)}, got {format!r}")
    out_dir = Path(out_dir)
    jobs: list[Job] = []
    for given in map(Path, inputs):
        try:
            jobs += [Job(source, _target(out_dir / place, format)) for source, place in _expand(given, out_dir)]
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


def restore_files(
    model: nn.Module,
    jobs: Sequence[Job],
    *,
    format: str = "same",
    quality: int = 95,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Restore every job's file; one that fails is reported in its :class:`Outcome` and does not stop the others.

    Args:
        format: ``"same"`` keeps what each file is (a PNG its bit depth too); ``"png"`` or ``"jpeg"`` converts.
        quality: of the JPEG files written, 1 to 100.
        on_done: called with each outcome as it comes.
    """
    outcomes = []
    for job in jobs:
        error = job.error or _restore_file(model, job, format, quality)
        outcome = Outcome(job.source, job.target, error)
        outcomes.append(outcome)
        if on_done is not None:
            on_done(outcome)
    return outcomes


def _restore_file(model: nn.Module, job: Job, format: str, quality: int) -> str | None:
    try:
        image = read_image(job.source)
        if format == "jpeg" and image.pixels.shape[2] in (2, 4):
            raise ImageError("format: a JPEG has no alpha channel and this image has one; write PNG")
        restored = restore_array(model, image.pixels)
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write_image(job.target, image.with_pixels(restored), None if format == "same" else format, quality=quality)
    except ImageError as error:
        return str(error)
    except Exception as error:  # whatever one file does to the model or the disk, the others are still tried
        return f"{type(error).__name__}: {error}"
    return None


def _expand(given: Path, out_dir: Path) -> list[tuple[Path, Path]]:
    """``(file, its place below the output folder)`` for a file, or for all images in a folder."""
    if given.is_dir():
        out = out_dir.resolve()
        files = sorted(p for p in given.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        files = [p for p in files if out == given.resolve() or out not in p.resolve().parents]
        if not files:
            raise FileNotFoundError("no PNG or JPEG files in this folder")
        return [(p, p.relative_to(given)) for p in files]
    if not given.exists():
        raise FileNotFoundError("no such file or folder")
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
