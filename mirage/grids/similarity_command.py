"""``mirage grids similarity``."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import FILE, FOLDER, KEY, STOPPED, device_named, reading_weights, require, stopping

__all__ = ["similarity"]

COUNT = click.IntRange(min=1)
KEPT = "measured.json"


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...", type=click.Path(path_type=Path))
@click.option("-o", "--out", "out_dir", required=True, type=FOLDER, help="Folder for tables and the picture.")
@click.option("--weights", type=FILE, help="Of the descriptor: a file of an SRResNet (MSRResNet), or the name of "
              "weights that come with the package.  [default: descriptor-srresnet]")  # fmt: skip
@KEY
@click.option("--degradations", help="Comma-separated ids, names, or several applied one after the other (GB+GN); "
              "`mirage degrade --list` tells them.  [default: the eleven of GRIDS]")  # fmt: skip
@click.option("--patches", default=800, show_default=True, type=COUNT, help="Random crops of the images.")
@click.option("--components", default=300, show_default=True, type=COUNT, help="Principal components, below --patches.")
@click.option("--crop", default=128, show_default=True, type=COUNT, help="Side of the crops that are degraded.")
@click.option("--patch", default=32, show_default=True, type=COUNT, help="Side of their middles, which are looked at.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of crops and degradations.")
@click.option("--symmetric", is_flag=True, help="Draw and print the mean of S and its transpose.")
@click.option("--memory", default="512M", show_default=True, help="For features that are held at a time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=COUNT, help="CPU threads of PyTorch.  [default: its own choice]")
def similarity(images: tuple[Path, ...], out_dir: Path, weights: Path | None, key: str | None, degradations: str | None,
               patches: int, components: int, crop: int, patch: int, seed: int, symmetric: bool, memory: str,
               device: str, threads: int | None) -> None:  # fmt: skip
    """Measure how alike degradations are, on clean IMAGES: files, or all in folders.

    Writes similarity.json (what `mirage grids search` and `train` read), similarity.csv, divergence.csv,
    parameters.csv and similarity.png. A run that was stopped goes on with the degradations that are missing.
    """
    import torch
    from rich.console import Console

    require("grids", "imagecodecs", "PIL", "matplotlib", "scipy")
    from mirage.degradations import ELEVEN
    from mirage.grids.descriptor import DEFAULT_WEIGHTS, SRResNetDescriptor
    from mirage.grids.matrix import similarity_matrix
    from mirage.grids.patches import sample_patches
    from mirage.restore.budget import parse_bytes

    if threads:
        torch.set_num_threads(threads)
    if patches <= components:
        raise click.BadParameter(f"expected less than --patches {patches}, got {components}", param_hint="--components")
    if patch > crop:
        raise click.BadParameter(f"expected at most --crop {crop}, got {patch}", param_hint="--patch")
    names = list(ELEVEN) if degradations is None else [name.strip() for name in degradations.split(",") if name.strip()]
    with reading_weights():
        descriptor = SRResNetDescriptor.from_weights(weights or DEFAULT_WEIGHTS, key=key, device=device_named(device))
    console = Console(stderr=True)
    try:
        room = parse_bytes(memory)
        clean = sample_patches(images, patches, crop, seed, lambda name, why: console.print(f"left out {name}: {why}"))
        out_dir.mkdir(parents=True, exist_ok=True)
        with stopping(), _bar(console, len(names)) as advance:
            found = similarity_matrix(
                descriptor, clean, names, components=components, patch=patch, seed=seed, memory=room,
                cache=out_dir / KEPT, progress=advance,
            )  # fmt: skip
        files = _write(found, out_dir, symmetric)
    except KeyboardInterrupt:
        click.echo("stopped; what was measured is kept, and the same command goes on from here", err=True)
        sys.exit(STOPPED)
    except (OSError, TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    _print(found, symmetric, Console(width=None if sys.stdout.isatty() else 160))
    for path in files:
        click.echo(f"wrote {path}", err=True)


def _bar(console: Any, total: int) -> Any:
    """A context of a progress bar, which gives what to call for each degradation."""
    from contextlib import contextmanager

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    @contextmanager
    def shown():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("degradations", total=total)

            def advance(name: str, ggd: Any) -> None:
                progress.update(task, advance=1)
                progress.console.print(f"{name}: alpha {ggd.alpha:.3f}, sigma {ggd.sigma:.4g}")

            yield advance

    return shown()


def _write(found: Any, folder: Path, symmetric: bool) -> list[Path]:
    import numpy as np

    from mirage.grids.draw import heat_map
    from mirage.grids.matrix import table
    from mirage.whole_files import write_whole

    parameters = np.array([[ggd.alpha, ggd.sigma] for ggd in found.ggds.values()])
    found.save(folder / "similarity.json")
    found.save(folder / "similarity.csv")
    write_whole(folder / "divergence.csv", table("", found.names, found.names, found.divergences).encode())
    text = table("degradation", found.names, ["alpha", "sigma"], parameters)
    write_whole(folder / "parameters.csv", text.encode())
    names = ["similarity.json", "similarity.csv", "divergence.csv", "parameters.csv"]
    if len(found.names) > 1:
        picture = io.BytesIO()
        heat_map(found, symmetric=symmetric).savefig(picture, format="png", dpi=150)
        write_whole(folder / "similarity.png", picture.getvalue())
        names.append("similarity.png")
    return [folder / name for name in names]


def _print(found: Any, symmetric: bool, console: Any) -> None:
    from rich import box
    from rich.table import Table

    values = found.symmetric if symmetric else found.values
    shown = Table(title="S(row, column); smaller is more alike", box=box.SIMPLE_HEAD)
    for head in ("", "alpha", "sigma", *found.names):
        shown.add_column(head, justify="right" if head else "left")
    for name, row in zip(found.names, values, strict=True):
        ggd = found.ggds[name]
        shown.add_row(name, f"{ggd.alpha:.3f}", f"{ggd.sigma:.4g}", *(f"{value:.2f}" for value in row))
    console.print(shown)
    rows = _beside_the_paper(found)
    if rows:
        beside = Table(title="Mean S within groups, beside the paper's (other weights, other photographs)",
                       box=box.SIMPLE_HEAD)  # fmt: skip
        for head in ("group", "here", "paper"):
            beside.add_column(head, justify="right" if head != "group" else "left")
        for group, here, paper in rows:
            beside.add_row(group, f"{here:.2f}", f"{paper:.2f}")
        console.print(beside)


def _beside_the_paper(found: Any) -> list[tuple[str, float, float]]:
    """The groups of Table 2 all of whose degradations were measured: their distance here and there."""
    import json

    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    rows = []
    for each in content["networks"]["restormer"]:
        members = each["group"].split("+")
        if "distance" in each and all(name in found.ggds for name in members):
            rows.append((each["group"], found.distance(members), float(each["distance"])))
    return sorted(rows, key=lambda row: row[2])
