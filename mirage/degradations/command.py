"""``mirage degrade``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage.commands.common import FILE, FOLDER, STOPPED, require, stopping

if TYPE_CHECKING:
    from mirage.degradations import Degradation
    from mirage.degradations.files import Counts, Pairs

__all__ = ["degrade"]


@click.command()
@click.argument("inputs", nargs=-1, metavar="IN...", type=click.Path(path_type=Path))
@click.option("-o", "--out", "out_dir", type=FOLDER, help="Output folder.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND",
              help="A degradation by id or name (GB, motion_blur), CDD11's compositions (low_haze), your own (GB+GN); "
                   "all: the eleven of GRIDS; cdd11: its eleven. Repeatable.  [default: all]")  # fmt: skip
@click.option("--range", "ranges", multiple=True, metavar="NAME=LOW[,HIGH]",
              help="Of a parameter of the one kind that is given, such as sigma=2,4. Repeatable.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="What everything is drawn from.")
@click.option(
    "--crop", type=click.IntRange(min=1), help="Cut a square of this side out of each image, at a random place."
)
@click.option("--map", "maps", multiple=True, metavar="WHAT=FOLDER",
              help="Pictures of depth, illumination, rain or snow for CDD11's kinds, under the images' names. "
                   "Repeatable.")  # fmt: skip
@click.option("--sheet", type=FILE, help="Draw every kind of the first image into this PNG, with what was drawn.")
@click.option("--list", "list_", is_flag=True, help="Print the kinds with their parameters, and stop.")
@click.option("--overwrite", is_flag=True, help="Begin anew what an earlier run has done.")
def degrade(inputs, out_dir, kinds, ranges, seed, crop, maps, sheet, list_, overwrite) -> None:
    """Degrade image files, or all image files in folders, by known parameters, and write pairs.

    OUT/clean has the images as 8-bit PNG, OUT/degraded what became of them; of several kinds, each has a folder of its
    own. OUT/parameters.json and .csv say what was drawn for each file, which depends on the seed, the file's name and
    the kind alone. The same command goes on where it was stopped. mirage train and mirage evaluate read such folders.
    """
    if list_:
        _list()
        return
    require("images", "PIL", "imagecodecs", "tifffile")
    if not inputs:
        raise click.UsageError("nothing to degrade: give files or folders")
    if out_dir is None and sheet is None:
        raise click.UsageError("nothing to write: give -o OUT, --sheet PNG or both")
    from mirage.degradations.files import Pairs

    try:
        of = _kinds(kinds, ranges)
        pairs = Pairs(of, seed, crop, _maps(maps, of))
        if sheet is not None:
            _sheet(sheet, inputs, seed)
        if out_dir is None:
            return
        counts, stopped = _degrade(inputs, out_dir, pairs, overwrite)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _tell(counts, out_dir)
    if stopped:
        click.echo("stopped; no file is half-written, and the same command goes on from here", err=True)
        sys.exit(STOPPED)
    sys.exit(1 if counts.failed else 0)


def _list() -> None:
    import dataclasses

    from mirage.degradations import CDD11, REGISTRY

    for kind, cls in REGISTRY.items():
        own = [each for each in dataclasses.fields(cls) if each.name != "rounded"]
        click.echo(
            f"{kind}  {cls.name}: {', '.join(f'{each.name} {_shown(each.default)}' for each in own) or 'no parameters'}"
        )
    click.echo(f"CDD11: {', '.join(CDD11)}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and isinstance(value[0], str):
        return "/".join(value)
    if isinstance(value, tuple):
        return f"{value[0]:.4g}" if value[0] == value[1] else f"{value[0]:.4g} to {value[1]:.4g}"
    return str(value)


def _kinds(names: tuple[str, ...], ranges: tuple[str, ...]) -> dict[str, Degradation]:
    from mirage.degradations import create, named

    made = named(names or ("all",))
    settings = dict(_range(one) for one in ranges)
    if settings and len(made) != 1:
        raise ValueError(f"--range: goes with one --kind, got {len(made)}")
    return {label: create(label, **settings) for label in made}


def _range(text: str) -> tuple[str, Any]:
    name, equals, bounds = text.partition("=")
    try:
        numbers = [float(each) for each in bounds.split(",")]
        if not equals or not name.strip() or len(numbers) > 2:
            raise ValueError
    except ValueError:
        raise ValueError(f"--range: expected NAME=NUMBER or NAME=LOW,HIGH, got {text!r}") from None
    return name.strip(), (numbers[0], numbers[-1])


def _maps(given: tuple[str, ...], kinds: dict[str, Degradation]) -> dict[str, Path]:
    from mirage.degradations.base import MAPS

    maps: dict[str, Path] = {}
    taken = {name for each in kinds.values() for name in each.takes}
    for each in given:
        what, equals, folder = each.partition("=")
        if what not in MAPS or not Path(folder).is_dir():
            raise ValueError(f"--map: expected one of {', '.join(MAPS)}, '=' and a folder, got {each!r}")
        if what in maps:
            raise ValueError(f"--map: expected one folder of {what}, got two: {str(maps[what])!r} and {folder!r}")
        if what not in taken:
            known = ", ".join(sorted(taken)) or "no maps"
            raise ValueError(f"--map: {what} is read by none of {', '.join(kinds)}; they take {known}")
        maps[what] = Path(folder)
    return maps


def _sheet(path: Path, inputs: tuple[Path, ...], seed: int) -> None:
    from mirage.degradations.files import read_pixels
    from mirage.degradations.sheets import draw_sheet
    from mirage.inputs import photographs_in

    first = inputs[0]
    if first.is_dir():
        found = photographs_in(first, lambda *_: None)
        if not found:
            raise ValueError(f"no images in {first}")
        first = found[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(path, read_pixels(first), seed)
    click.echo(f"wrote {path}", err=True)


def _degrade(inputs: tuple[Path, ...], out_dir: Path, pairs: Pairs, overwrite: bool) -> tuple[Counts, bool]:
    """Under a progress bar on stderr; whether it was stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mirage.degradations.files import Counts, degrade_files

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    counts = Counts()
    with stopping(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")

        def on_step(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=name)

        try:
            degrade_files(inputs, out_dir, pairs, overwrite=overwrite, on_step=on_step, counts=counts)
        except KeyboardInterrupt:
            return counts, True
    return counts, False


def _tell(counts: Counts, out_dir: Path, listed: int = 5) -> None:
    for each in counts.failed:
        click.echo(f"failed: {each.source}: {each.error}", err=True)
    if counts.skipped:
        names = [f"{path} ({reason})" for path, reason in counts.skipped[:listed]]
        more = [f"and {len(counts.skipped) - listed} more"] if len(counts.skipped) > listed else []
        click.echo(f"skipped {len(counts.skipped)} in folders: {', '.join([*names, *more])}", err=True)
    finished = f", {counts.finished} were finished before" if counts.finished else ""
    total = counts.degraded + counts.finished + len(counts.failed)
    click.echo(f"degraded {counts.degraded} of {total} into {out_dir}{finished}")
