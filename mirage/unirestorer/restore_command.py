"""``mirage unirestorer restore``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import FOLDER, device_named, reading_weights, require
from mirage.grids.restore_command import write_all
from mirage.unirestorer.command_parts import CONFIDENCE, SYSTEM

__all__ = ["restore"]


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IN...", type=click.Path(path_type=Path))
@SYSTEM
@click.option("-o", "--out", "out_dir", required=True, type=FOLDER, help="Output folder.")
@click.option("--task", help="What is wrong with the images: leaves of other tasks are not chosen.")
@CONFIDENCE
@click.option("--format", "format_", default="same", show_default=True,
              type=click.Choice(["same", "png", "jpeg", "tiff", "webp", "avif", "heic"]),
              help="Of the results.")  # fmt: skip
@click.option("--quality", default=95, show_default=True, type=click.IntRange(1, 100), help="Of all but PNG and TIFF.")
@click.option("--memory", metavar="SIZE", help="Such as 2G: for the weights of experts; those not used for longest go.")
@click.option("--image-memory", metavar="SIZE", help="Such as 2G: for restoring an image, as --memory of mirage "
              "restore.")  # fmt: skip
@click.option("--tile", type=click.IntRange(min=8), help="Side of tiles, as of mirage restore.")
@click.option("--overwrite", is_flag=True, help="Restore again what an earlier run has done.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
def restore(inputs: tuple[Path, ...], folder: Path, out_dir: Path, task: str | None, confidence: float | None,
            format_: str, quality: int, memory: str | None, image_memory: str | None, tile: int | None,
            overwrite: bool, device: str, threads: int | None) -> None:  # fmt: skip
    """Restore image files, or all in folders, each with the expert that the router picks.

    Prints each file's leaf, level and expert; experts.csv and experts.jsonl in the output folder have the same, with
    all probabilities and the uncertainty. Files that are done are left alone, so the same command goes on where one was
    stopped. The exit status is 1 where a file failed, and 130 after Ctrl-C.
    """
    import torch

    require("images", "imagecodecs", "PIL", "tifffile")
    from mirage.restore.files import collect_jobs
    from mirage.unirestorer.system import UniRestorer

    if threads:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"memory": image_memory, "tile": tile}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        with reading_weights():
            system = UniRestorer.load(folder, device=device_named(device), memory=memory, confidence=confidence)
        count = len(collect_jobs(inputs, out_dir, format_))
        outcomes = system.files(
            inputs, out_dir, task=task, overwrite=overwrite, format=format_, quality=quality, **options
        )
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    write_all(outcomes, count, partial(_line, by_router=confidence is None))


def _line(outcome: Any, by_router: bool) -> str | None:
    found = outcome.explanation
    if found is None:
        return None
    before = "  (done before)" if outcome.skipped else ""
    likely = f" ({found.p_level[found.level]:.2f})" if by_router else ""
    return (
        f"{outcome.source}  leaf {found.leaf} ({found.p_leaf[found.leaf]:.2f})  level {found.level}{likely}  "
        f"expert {found.expert} ({' '.join(found.tasks[:4])}){before}"
    )
