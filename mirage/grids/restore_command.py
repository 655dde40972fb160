"""``mirage grids restore``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from mirage.commands.common import FOLDER, STOPPED, device_named, reading_weights, require, stopping

__all__ = ["restore", "write_all"]


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IN...", type=click.Path(path_type=Path))
@click.option("--groups", required=True, type=FOLDER, help="Folder that mirage grids train wrote.")
@click.option("-o", "--out", "out_dir", required=True, type=FOLDER, help="Output folder.")
@click.option("--format", "format_", default="same", show_default=True,
              type=click.Choice(["same", "png", "jpeg", "tiff", "webp", "avif", "heic"]),
              help="Of the results.")  # fmt: skip
@click.option("--quality", default=95, show_default=True, type=click.IntRange(1, 100), help="Of all but PNG and TIFF.")
@click.option("--memory", metavar="SIZE", help="Such as 2G: for the weights of networks; those not used for longest "
              "go.")  # fmt: skip
@click.option("--image-memory", metavar="SIZE", help="Such as 2G: for restoring an image, as --memory of mirage "
              "restore.")  # fmt: skip
@click.option("--tile", type=click.IntRange(min=8), help="Side of tiles, as of mirage restore.")
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]),
              help="What networks compute in.")  # fmt: skip
@click.option("--foreign", type=float, help="Distance above which an image is foreign.  [default: the folder's]")
@click.option("--overwrite", is_flag=True, help="Restore again what an earlier run has done.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
def restore(inputs: tuple[Path, ...], groups: Path, out_dir: Path, format_: str, quality: int, overwrite: bool,
            device: str, threads: int | None, **options: Any) -> None:  # fmt: skip
    """Restore image files, or all in folders, each with the network of the group it lies nearest to.

    Prints each file's group, its distance, and whether it is foreign to all groups; groups.csv and groups.jsonl in the
    output folder have the same. Files that are done are left alone, so the same command goes on where one was stopped.
    The exit status is 1 where a file failed, and 130 after Ctrl-C.
    """
    import torch

    require("grids", "imagecodecs", "PIL", "tifffile")
    from mirage.grids.restorer import GroupedRestorer
    from mirage.restore.files import collect_jobs

    if threads:
        torch.set_num_threads(threads)
    chosen = {name: value for name, value in options.items() if value is not None}
    try:
        with reading_weights():
            restorer = GroupedRestorer.load(groups, device=device_named(device), **chosen)
        count = len(collect_jobs(inputs, out_dir, format_))
        outcomes = restorer.files(inputs, out_dir, overwrite=overwrite, format=format_, quality=quality)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    write_all(outcomes, count, _line)


def write_all(outcomes: Any, count: int, line_of: Callable[[Any], str | None]) -> NoReturn:
    """Restore under a progress bar, print a line for each file, and end the command with its exit status.

    Args:
        outcomes: a generator of `mirage.restore.Outcome`.
        count: of files.
        line_of: the line of an outcome without an error; None: none.
    """
    from rich.console import Console

    failed, stopped = _with_progress(outcomes, count, Console(stderr=True), line_of)
    if stopped:
        click.echo("stopped; no file is half-written, and the same command goes on from here", err=True)
        sys.exit(STOPPED)
    sys.exit(1 if failed else 0)


def _with_progress(outcomes: Any, count: int, console: Any, line_of: Callable[[Any], str | None]) -> tuple[int, bool]:
    """How many files failed, and whether it was stopped; the console is for the bar and for what failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with stopping(), Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("restoring", total=count)
        try:
            for outcome in outcomes:
                if outcome.error is not None:
                    failed += 1
                    message = f"failed: {outcome.source}: {outcome.error}"
                    console.print(message, style="red", markup=False, soft_wrap=True)
                line = line_of(outcome) if outcome.error is None else None
                if line is not None:
                    click.echo(line)
                progress.advance(bar)
        except KeyboardInterrupt:
            outcomes.close()
            return failed, True
    return failed, False


def _line(outcome: Any) -> str | None:
    choice = outcome.choice
    if choice is None:
        return None
    foreign = "  foreign: no group was trained on this" if choice.foreign else ""
    before = "  (done before)" if outcome.skipped else ""
    return f"{outcome.source}  {choice.group}  {choice.distance:.2f}{foreign}{before}"
