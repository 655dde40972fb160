"""``mirage restore``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage.commands.common import KEY, STOPPED, WEIGHTS, device_named, reading_weights, require, stopping
from mirage.distributed.command import ray_options, restore_with_ray

if TYPE_CHECKING:
    from mirage.restore.files import Outcome

__all__ = ["restore"]

HOW = ("fast", "device", "dtype", "memory", "tile", "overlap", "attention", "window", "scratch")
"""Options that are arguments of `mirage.Restorer`."""


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    from mirage.restore.budget import parse_bytes

    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("memory: ")) from error


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IN...", type=click.Path())
@WEIGHTS
@KEY
@click.option("-o", "--out", "out_dir", required=True, type=click.Path(file_okay=False), help="Output folder.")
@click.option(
    "--format",
    "format_",
    default="same",
    show_default=True,
    type=click.Choice(["same", "png", "jpeg", "tiff", "webp", "avif", "heic"]),
    help="Format of the results; 'same' keeps each file's own, bit depth included.",
)
@click.option("--quality", default=95, show_default=True, type=click.IntRange(1, 100), help="Of all but PNG and TIFF.")
@click.option("--max-pixels", type=click.IntRange(min=1), help="Refuse larger images.  [default: 178956970]")
@click.option(
    "--check-memory/--no-check-memory",
    default=True,
    show_default=True,
    help="Refuse an image that needs more memory than there is, before it takes it.",
)
@click.option(
    "--attention",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "whole", "tile", "local", "global"]),
    help="auto: one pass where memory is enough, else global, which equals it; whole: one pass, or an error; tile: "
    "each tile by itself, blended; local: statistics of windows; global: in strips.",
)
@click.option("--memory", metavar="SIZE", callback=_bytes, help="Such as 2G: what the process's memory may come to; of "
              "the GPU, there.  [default: what is available]")  # fmt: skip
@click.option("--tile", type=click.IntRange(min=8), help="Side of tiles in pixels, at most; means --attention tile.  "
              "[default: from the memory]")  # fmt: skip
@click.option("--overlap", type=click.IntRange(min=0), help="Of tiles, in pixels.  [default: 32, or half a tile]")
@click.option("--window", default=192, show_default=True, type=click.IntRange(min=8), help="Of local, in pixels.")
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, exists=True),
    help="Folder for feature maps of local and global.  [default: the system's]",
)
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]),
              help="What the network computes in.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Restore again what an earlier run has done.")
@click.option("--fast/--reference", default=True, show_default=True, help="The fast modules, or plain PyTorch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
@ray_options
def restore(inputs, weights, key, out_dir, format_, quality, max_pixels, check_memory, overwrite, threads, **others):
    """Restore image files, or all image files in folders, into a folder.

    PNG, JPEG, TIFF, WebP, AVIF and HEIC, 8 and 16 bits, grey or RGB, of any size. Alpha is copied through, grey files
    stay grey (a file with three equal channels counts as colour and may come back tinted). The orientation is applied;
    EXIF, XMP, colour profile and density are carried over, to other formats too. Results keep the names of their
    inputs, appear when they are complete, and never replace an input. A result that is there and not older than its
    input is finished and skipped, so the same command goes on where an earlier one was stopped (with other weights, use
    --overwrite or another folder). A file that fails is reported and the others are still done; the exit status is then
    1, and 130 after Ctrl-C. Pictures in other formats, sidecars of macOS (._a.jpg) and links to nothing are skipped in
    folders, and named.

    With --engine ray, IN and OUT may also be URLs (s3://bucket/in), a manifest says what became of each file, and what
    is done is left alone (docs/scale-out.md).
    """
    how = {name: others.pop(name) for name in HOW}
    _check_mode(how)
    if others.pop("engine") == "ray":
        others.update(key=key, format=format_, quality=quality, max_pixels=max_pixels, overwrite=overwrite)
        sys.exit(restore_with_ray(inputs, out_dir, weights, restorer=how, **others))
    import torch

    require("images", "PIL", "imagecodecs", "tifffile")
    from mirage.restore import Restorer, collect_jobs

    if threads:
        torch.set_num_threads(threads)
    skipped: list[tuple[Path, str]] = []
    jobs = collect_jobs(map(Path, inputs), Path(out_dir), format_, on_skip=lambda *file: skipped.append(file))
    with reading_weights():
        restorer = Restorer(weights, key=key, **{**how, "device": device_named(how["device"])})
    options: dict[str, Any] = {"format": format_, "quality": quality, "check_memory": check_memory}
    if max_pixels:
        options["max_pixels"] = max_pixels
    counts = _with_progress(restorer.run(jobs, overwrite=overwrite, **options), len(jobs))
    if skipped:
        click.echo(_describe_skipped(skipped), err=True)
    finished = f", {counts.finished} were finished before" if counts.finished else ""
    click.echo(f"restored {counts.restored} of {len(jobs)} into {out_dir}{finished}")
    if counts.stopped:
        click.echo("stopped; no file is half-written, and the same command goes on from here", err=True)
        sys.exit(STOPPED)
    sys.exit(1 if counts.failed else 0)


def _check_mode(how: dict[str, Any]) -> None:
    from mirage.restore.tiles import resolve_overlap

    try:
        how["overlap"] = resolve_overlap(how["tile"], how["overlap"])
        if how["tile"] is not None and how["attention"] not in ("auto", "tile"):
            raise ValueError(f"tile: goes with attention tile, got attention={how['attention']!r}")
        if how["attention"] in ("local", "global") and not how["fast"]:
            raise ValueError(f"--attention {how['attention']} needs the fast modules, not --reference")
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@dataclass
class _Counts:
    """What became of the files of a run."""

    restored: int = 0
    finished: int = 0
    failed: int = 0
    stopped: bool = False

    def add(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.failed += 1
        elif outcome.skipped:
            self.finished += 1
        else:
            self.restored += 1


def _describe_skipped(skipped: list[tuple[Path, str]], listed: int = 5) -> str:
    """One line on the files of folders that were left out."""
    names = [f"{path} ({reason})" for path, reason in skipped[:listed]]
    more = [f"and {len(skipped) - listed} more"] if len(skipped) > listed else []
    return f"skipped {len(skipped)} in folders: " + ", ".join([*names, *more])


def _with_progress(outcomes: Iterator[Outcome], count: int) -> _Counts:
    """Go through the outcomes under a progress bar on stderr; print notes and failures; stop at Ctrl-C."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    counts = _Counts()
    with stopping(), Progress(*columns, console=console) as progress:
        task = progress.add_task("restoring", total=count)
        try:
            for outcome in outcomes:
                counts.add(outcome)
                for note in outcome.notes:
                    console.print(f"note: {outcome.source}: {note}", style="yellow", markup=False, soft_wrap=True)
                if outcome.error is not None:
                    failure = f"failed: {outcome.source}: {outcome.error}"
                    console.print(failure, style="red", markup=False, soft_wrap=True)
                progress.advance(task)
        except KeyboardInterrupt:
            counts.stopped = True
    return counts
