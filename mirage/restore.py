"""Restore image files with a trained model: ``mirage restore``.

The network takes RGB in [0, 1] whose sides are multiples of 8. Here images of any size are padded on the right and at
the bottom and cropped back, grey images are fed as three equal channels and come back as their mean, and an alpha
channel is copied through untouched. Colours where alpha is 0 nobody sees, so they are copied too, and the network gets
in their place what its neighbours have: no hidden colour reaches a visible pixel. An RGB file with R = G = B is an RGB
image like any other, which the network may tint; save it as grey for a grey result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mirage_kernels
from mirage.images import (
    FORMATS,
    MAX_PIXELS,
    SUFFIXES,
    ImageError,
    ImageHeader,
    check_size,
    decode_image,
    read_bytes,
    read_header,
    write_image,
)
from mirage.inputs import is_below, photographs_in
from mirage.memory import available_memory, format_bytes
from mirage.model import MIRAGE

__all__ = [
    "Job",
    "Outcome",
    "collect_jobs",
    "load_model",
    "needed_memory",
    "pad_to_multiple",
    "restore_array",
    "restore_files",
]

MULTIPLE = 8
"""The sides of the network's input are multiples of this."""

# What an image takes at its peak, in bytes: the most that was measured at 512x512 and 1024x1024 pixels, dims 12 to 30,
# by the rise of resident memory (VmHWM) around `restore_array`, and up to a tenth more.
BYTES_PER_PIXEL = 84  # float32 in, float64 out, and their clipping
BYTES_PER_SAMPLE_BYTE = 8  # the file, its decoding, turning, writing
BYTES_PER_HIDDEN_PIXEL = 64  # `fill_hidden`, of images with alpha
# The network's, per pixel and channel of its `dim`. PyTorch's own operators leave holes in the heap, of some hundred
# MiB at most, which weigh more in small images.
FAST_BYTES_PER_CHANNEL = 40  # 36 measured (MIRAGE-S), 17 in bfloat16
REFERENCE_BYTES_PER_CHANNEL = 220  # 201 measured at 640x448 (dim 12), 157 at 512x512 (MIRAGE-T)
REFERENCE_BYTES_PER_CHANNEL_LARGE, REFERENCE_HEAP = 160, 256 << 20  # 145 at 1024x1024, 165 at 768x768 (MIRAGE-T)


@dataclass(frozen=True)
class Job:
    """One file to restore: ``source`` -> ``target``, or the ``error`` that already forbids it."""

    source: Path
    target: Path
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one :class:`Job`; ``error`` is None where ``target`` was written. ``notes``: what of the file's
    metadata could not be read or carried over."""

    source: Path
    target: Path
    error: str | None = None
    notes: tuple[str, ...] = ()


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
        The same shape and type; results outside [0, 1] are clipped; alpha, and colours where it is 0, are the input's.

    Raises:
        ValueError: the model returned another shape, or values that are not finite.
    """
    scale = float(np.iinfo(pixels.dtype).max)
    channels = pixels.shape[2]
    colours = channels - (channels in (2, 4))
    parameter = next(model.parameters(), torch.empty(0))
    x = torch.from_numpy(pixels[..., :colours].astype(np.float32)).div_(scale).permute(2, 0, 1)[None]
    hidden = pixels[..., colours:] == 0  # empty without alpha
    if hidden.any() and not hidden.all():
        x = fill_hidden(x, torch.from_numpy(hidden).permute(2, 0, 1)[None])
    x = x.expand(1, 3, -1, -1).to(parameter.device, parameter.dtype)
    padded = pad_to_multiple(x)
    y = model(padded)
    if not isinstance(y, Tensor) or y.shape != padded.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"model: expected an image of shape {list(padded.shape)}, got {got}")
    y = y[0, :, : pixels.shape[0], : pixels.shape[1]]
    if not torch.isfinite(y).all():
        raise ValueError("the model's output has values that are not finite")
    y = y.double()
    y = y.mean(0, keepdim=True) if colours == 1 else y
    restored = y.clamp_(0, 1).mul_(scale).round_().permute(1, 2, 0).cpu().numpy().astype(pixels.dtype)
    if hidden.any():
        restored = np.where(hidden, pixels[..., :colours], restored)
    return np.concatenate([restored, pixels[..., colours:]], axis=2)


def fill_hidden(x: Tensor, hidden: Tensor) -> Tensor:
    """``x`` with the values of hidden pixels made up from the nearest visible ones.

    Args:
        x: ``[1, C, H, W]``, floating point.
        hidden: ``[1, 1, H, W]``, bool, not all of it True.

    Returns:
        ``[1, C, H, W]``: visible pixels as they are; a hidden one is the mean of the visible ones in the smallest of
        the squares of 2, 4, 8, ... pixels around it that have any, interpolated between such squares.
    """
    weight = (~hidden).to(x.dtype)
    value = x * weight
    levels = []
    while (weight == 0).any():
        levels.append((value, weight))
        value, weight = (nn.functional.avg_pool2d(v, 2, ceil_mode=True) for v in (value, weight))
    filled = value / weight
    for value, weight in reversed(levels):
        above = nn.functional.interpolate(filled, size=value.shape[2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, value / weight.clamp_min(torch.finfo(x.dtype).tiny), above)
    return torch.where(hidden, filled, x)


def needed_memory(model: nn.Module, header: ImageHeader) -> int:
    """Bytes of this machine's memory that reading, restoring and writing an image takes at once, more or less.

    Of a `mirage.MIRAGE` on the CPU it is what was measured, by the network's channels and with a margin; the pixels of
    a network on another device, and those of another network, do not count.
    """
    per_pixel = BYTES_PER_PIXEL + header.channels * header.depth // 8 * BYTES_PER_SAMPLE_BYTE
    if header.channels in (2, 4):
        per_pixel += BYTES_PER_HIDDEN_PIXEL
    needed = header.pixels * per_pixel
    network = next((module for module in model.modules() if isinstance(module, MIRAGE)), None)
    if network is not None and network.output.weight.device.type == "cpu":
        from mirage import fast

        size = network.output.weight.element_size() / 4  # of a value, in float32's
        units = header.pixels * network.config["dim"]
        if isinstance(network, fast.MIRAGE):
            needed += int(units * FAST_BYTES_PER_CHANNEL * size)
        else:
            large = units * REFERENCE_BYTES_PER_CHANNEL_LARGE + REFERENCE_HEAP
            needed += int(min(units * REFERENCE_BYTES_PER_CHANNEL, large) * max(1, size))
    return needed


def collect_jobs(
    inputs: Iterable[str | Path],
    out_dir: str | Path,
    format: str = "same",
    on_skip: Callable[[Path, str], None] | None = None,
) -> list[Job]:
    """List what to restore and where to, without reading more of a file than its first bytes.

    A file goes to ``out_dir`` under its own name; a folder is searched through for PNG and JPEG files, which keep their
    places below it. ``format`` is ``"same"``, ``"png"`` or ``"jpeg"`` and sets the suffix. A job carries an error in
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
    """Restore every job's file; one that fails is reported in its :class:`Outcome` and does not stop the others.

    Args:
        format: ``"same"`` keeps what each file is (a PNG its bit depth too); ``"png"`` or ``"jpeg"`` converts.
        quality: of the JPEG files written, 1 to 100.
        max_pixels: an image with more pixels is refused.
        check_memory: refuse an image that takes more memory than is available, before it takes it; see
            `needed_memory` and `mirage.memory`.
        on_done: called with each outcome as it comes.
    """
    outcomes = []
    for job in jobs:
        outcome = Outcome(job.source, job.target, job.error)
        if job.error is None:
            outcome = _restore_file(model, job, format, quality, max_pixels, check_memory)
        if outcome.error is not None:
            _release_memory()  # whatever it was: the next file shall not fail for what this one left
        outcomes.append(outcome)
        if on_done is not None:
            on_done(outcome)
    return outcomes


def _restore_file(
    model: nn.Module, job: Job, format: str, quality: int, max_pixels: int, check_memory: bool
) -> Outcome:
    notes: tuple[str, ...] = ()
    try:
        data = read_bytes(job.source)
        header = read_header(data)
        check_size(header, max_pixels)
        if check_memory:
            _check_memory(model, header)
        image = decode_image(data, max_pixels=max_pixels)
        notes = image.notes
        if format == "jpeg" and image.pixels.shape[2] in (2, 4):
            raise ImageError("format: a JPEG has no alpha channel and this image has one; write PNG")
        restored = restore_array(model, image.pixels)
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write_image(job.target, image.with_pixels(restored), None if format == "same" else format, quality=quality)
    except ImageError as error:
        return Outcome(job.source, job.target, str(error), notes)
    except Exception as error:  # whatever one file does to the model or the disk, the others are still tried
        what = str(error) or ("out of memory" if isinstance(error, MemoryError) else "no message")
        return Outcome(job.source, job.target, f"{type(error).__name__}: {what}", notes)
    return Outcome(job.source, job.target, None, notes)


def _check_memory(model: nn.Module, header: ImageHeader) -> None:
    """Raise ImageError where an image needs more memory than there is, also once what is kept has been given back."""
    needed = needed_memory(model, header)
    available = available_memory()
    if available is not None and needed > available.bytes:
        _release_memory()
        available = available_memory()
    if available is not None and needed > available.bytes:
        raise ImageError(
            f"not enough memory: {header.width}x{header.height} pixels need about {format_bytes(needed)}, "
            f"{format_bytes(available.bytes)} are available ({available.bound}); --no-check-memory tries all the same"
        )


def _release_memory() -> None:
    """Give back what is kept for the next image: results in cycles, the kernels' workspace, a GPU's cache."""
    gc.collect()
    mirage_kernels.release_workspace()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _expand(given: Path, out_dir: Path, skip: Callable[[Path, str], None]) -> list[tuple[Path, Path]]:
    """``(file, its place below the output folder)`` for a file, or for all images in a folder."""
    if given.is_dir():
        inside = out_dir.resolve() == given.resolve()  # then results cannot be told from inputs by their place

        def is_result(path: Path) -> bool:
            return not inside and is_below(path, out_dir)

        files = photographs_in(given, lambda path, reason: None if is_result(path) else skip(path, reason))
        files = [path for path in files if not is_result(path)]
        if not files:
            raise FileNotFoundError("no PNG or JPEG files in this folder")
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
