"""``mirage grids calibrate``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mirage.commands.common import FOLDER, STOPPED, device_named, reading_weights, require, stopping

__all__ = ["calibrate"]

RECORD = "calibration.json"
KEPT = "calibration-measured.json"


@click.command()
@click.argument("pictures", metavar="DIR", type=FOLDER)
@click.option("--groups", required=True, type=FOLDER, help="Folder that mirage grids train wrote.")
@click.option("--count", default=5, show_default=True, type=click.IntRange(min=1), help="Pictures for each "
              "degradation: the first ones, by name.")  # fmt: skip
@click.option("--crop", default=0, show_default=True, type=click.IntRange(min=0), help="Side of what is degraded, of "
              "their middles; 0: whole pictures, as photographs will be.")  # fmt: skip
@click.option("--share", default=0.95, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Of the "
              "pictures that are to be below the limit.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the degradations.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
def calibrate(pictures: Path, groups: Path, count: int, crop: int, share: float, seed: int, device: str) -> None:
    """Set the distance above which a photograph is foreign to all groups, from clean pictures that this degrades.

    Each degradation of the groups is drawn on --count pictures of DIR. The limit is what --share of them stay below;
    it takes the place of the old one in the folder's groups.json, and calibration.json beside it has all distances.
    A picture takes about as long as a degradation of mirage grids similarity; the same command goes on where it was
    stopped, and pictures that are done (calibration-measured.json) are not measured again with another --share.

    \b
        mirage grids calibrate CBSD68 --groups networks
    """
    from rich.console import Console
    from rich.progress import track

    require("grids", "PIL")
    from mirage.grids.calibration import calibrate as calibrated
    from mirage.grids.calibration import degraded
    from mirage.grids.restorer import GroupedRestorer
    from mirage.grids.training import MeasureGroup

    try:
        with reading_weights():
            restorer = GroupedRestorer.load(groups, device=device_named(device))
        measure = MeasureGroup(str(pictures), crop or None, count, seed)
        names = [name for group in restorer.groups.values() for name in group.degradations]
        total, console = len(names) * len(measure.files()), Console(stderr=True)
        with stopping():
            seen = track(degraded(measure, names), "measuring", total, console=console, transient=True)
            found = calibrated(restorer, seen, share, groups / KEPT)
        before, restorer.foreign = restorer.foreign, found.limit
        found.save(groups / RECORD)
        restorer.save(groups)
    except KeyboardInterrupt:
        click.echo(
            "stopped; the limit is what it was, what was measured is kept, and the same command goes on", err=True
        )
        sys.exit(STOPPED)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for name, distances in found.distances.items():
        span = f"{min(distances):.2f} to {max(distances):.2f}"
        click.echo(f"{name:12s} {span:14s} {found.own_group[name]:.0%} nearest to their own group")
    click.echo(f"limit        {found.limit:.2f}           before: {before:.2f}")
