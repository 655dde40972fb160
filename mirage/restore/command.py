"""``mirage restore``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import KEY, WEIGHTS, device_named, reading_weights, require
from mirage.distributed.command import ray_options, restore_with_ray

__all__ = ["restore"]


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
@click.option("--fast/--reference", default=True, show_default=True, help="The fast modules, or plain PyTorch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
@ray_options
def restore(inputs, weights, key, out_dir, format_, quality, max_pixels, check_memory, fast, device, threads, **ray):
    """Restore image files, or all image files in folders, into a folder.

    PNG, JPEG, TIFF, WebP, AVIF and HEIC, 8 and 16 bits, grey or RGB. Alpha is copied through, grey files stay grey (a
    file with three equal channels counts as colour and may come back tinted). The orientation is applied; EXIF, XMP,
    colour profile and density are carried over, to other formats too. Results keep the names of their inputs and
    replace earlier results, never an input. A file that fails is reported and the others are still done; the exit
    status is then 1. Pictures in other formats, sidecars of macOS (._a.jpg) and links to nothing are skipped in
    folders, and named.

    With --engine ray, IN and OUT may also be URLs (s3://bucket/in), a manifest says what became of each file, and what
    is done is left alone (docs/scale-out.md).
    """
    if ray.pop("engine") == "ray":
        ray.update(key=key, format=format_, quality=quality, max_pixels=max_pixels)
        sys.exit(restore_with_ray(inputs, out_dir, weights, restorer={"fast": fast, "device": device}, **ray))
    import torch

    require("images", "PIL", "imagecodecs", "tifffile")
    from mirage.restore import Restorer, collect_jobs

    if threads:
        torch.set_num_threads(threads)
    skipped: list[tuple[Path, str]] = []
    jobs = collect_jobs(map(Path, inputs), Path(out_dir), format_, on_skip=lambda *file: skipped.append(file))
    with reading_weights():
        restorer = Restorer(weights, fast=fast, device=device_named(device), key=key)
    options: dict[str, Any] = {"format": format_, "quality": quality, "check_memory": check_memory}
    if max_pixels:
        options["max_pixels"] = max_pixels
    failed = _with_progress(restorer.run(jobs, overwrite=True, **options), len(jobs))
    if skipped:
        click.echo(_describe_skipped(skipped), err=True)
    click.echo(f"restored {len(jobs) - failed} of {len(jobs)} into {out_dir}")
    sys.exit(1 if failed else 0)


def _describe_skipped(skipped: list[tuple[Path, str]], listed: int = 5) -> str:
    """One line on the files of folders that were left out."""
    names = [f"{path} ({reason})" for path, reason in skipped[:listed]]
    more = [f"and {len(skipped) - listed} more"] if len(skipped) > listed else []
    return f"skipped {len(skipped)} in folders: " + ", ".join([*names, *more])


def _with_progress(outcomes, count: int) -> int:
    """Go through the outcomes under a progress bar on stderr; print notes and failures; return the number of these."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("restoring", total=count)
        for outcome in outcomes:
            for note in outcome.notes:
                console.print(f"note: {outcome.source}: {note}", style="yellow", markup=False, soft_wrap=True)
            if outcome.error is not None:
                failed += 1
                console.print(f"failed: {outcome.source}: {outcome.error}", style="red", markup=False, soft_wrap=True)
            progress.advance(task)
    return failed
