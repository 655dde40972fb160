"""``mirage unirestorer evaluate``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage.commands.common import FOLDER, device_named, require
from mirage.unirestorer.command_parts import CONFIDENCE, SYSTEM, told

if TYPE_CHECKING:
    from mirage.unirestorer.folder import SystemFolder

__all__ = ["evaluate"]

SUMMARY = "summary.json"
MEANS = {"in": "mean, trained on", "out": "mean, held out"}


@click.command()
@click.argument("pictures", metavar="DIR", type=FOLDER)
@SYSTEM
@click.option("-o", "--out", required=True, type=FOLDER, help="Folder for what is measured.")
@click.option("--degradations", help="Such as GB,low_haze,GB+GN; those that the tree was not trained on are held out.  "
              "[default: all that it was trained on]")  # fmt: skip
@CONFIDENCE
@click.option("--crop", default=128, show_default=True, type=click.IntRange(min=0),
              help="Side of what is measured, of the middle of the pictures; 0: whole pictures.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Only the first pictures.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the degradations.")
@click.option("--memory", metavar="SIZE", help="Such as 2G: for the weights of experts; those not used for longest go.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
def evaluate(pictures: Path, folder: Path, out: Path, degradations: str | None, confidence: float | None,
             crop: int, limit: int | None, seed: int, memory: str | None, device: str,
             threads: int | None) -> None:  # fmt: skip
    """Degrade clean pictures of DIR, restore each with every expert, and tell what the router's choice is worth.

    Beside the router stand the root, always the finest level, the router that is told the task, and the best leaf and
    the best node, which know the clean picture: PSNR in dB of RGB, and how often each level was chosen. OUT/NAME.json
    has all pictures of a degradation, OUT/summary.json the table. The same command goes on where it was stopped, and
    with --confidence, which adds a column, and tells of its levels, nothing is measured again.

    \b
        mirage unirestorer evaluate CBSD68 --system system -o measured --degradations GB,GN,GB+GN
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    require("train", "lightning_fabric", "yaml", "PIL", "fsspec", "braceexpand")
    from mirage.grids.training import MeasureGroup
    from mirage.unirestorer.evaluation import measured_choices, summarise_choices
    from mirage.unirestorer.folder import SystemFolder
    from mirage.whole_files import write_whole

    if threads:
        torch.set_num_threads(threads)
    place, console = SystemFolder(folder), Console(stderr=True)
    with told():
        system = place.system(device=device_named(device), memory=memory)
        trained = _trained_kinds(place)
        names = _names(degradations, trained)
        test = MeasureGroup(str(pictures), crop or None, limit, seed, kinds=tuple(trained.items()))
        identity = {**test.identity, "weights": _digest(place)}
        out.mkdir(parents=True, exist_ok=True)
        measured = {}
        for name in track(names, "degradations", console=console, transient=True):
            file = out / f"{name.replace('/', '_')}.json"
            measured[name] = measured_choices(system, test.pairs(name), name, file, identity)
        summary = summarise_choices(system.tree, measured, system.tree.tasks, confidence)
        write_whole(out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode("utf-8"))
    _print(summary)


def _trained_kinds(place: SystemFolder) -> dict[str, Any]:
    """What the tree's samples were degraded by, by the tasks' names."""
    sets = place.samples()["data"].get("sets", ())
    return {one["name"]: one["kind"] for one in sets if one.get("name") and one.get("kind") is not None}


def _digest(place: SystemFolder) -> str:
    """Of experts and extractor, which the system's fingerprint leaves out."""
    digest = hashlib.blake2b(digest_size=16)
    for file in (*sorted(place.experts_folder.glob("*.safetensors")), place.extractor_file):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _names(text: str | None, trained: Mapping[str, Any]) -> list[str]:
    from mirage.degradations import create_from

    names = list(trained) if text is None else text.replace(",", " ").split()
    if not names:
        raise ValueError("degradations: expected at least one, and the tree's samples were degraded by none of ours")
    if len(set(names)) < len(names):
        raise ValueError(f"degradations: expected each once, got {', '.join(names)}")
    for name in names:
        create_from(trained.get(name, name))
    return names


def _print(summary: Mapping[str, Any]) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("degradation", no_wrap=True)
    for head in ("images", *summary["ways"]):
        table.add_column(head, justify="right")
    table.add_column("levels from 0", no_wrap=True)
    rows = {name if row["in_distribution"] else f"{name} (held out)": row
            for name, row in summary["degradations"].items()}  # fmt: skip
    rows |= {title: summary["means"][part] for part, title in MEANS.items() if part in summary["means"]}
    for name, row in rows.items():
        levels = " ".join(f"{share:.0%}" for share in row["levels"])
        table.add_row(name, str(row["images"]), *(f"{row[way]:.2f}" for way in summary["ways"]), levels)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if "coarser" in summary:
        coarser = summary["coarser"]
        levels, above = coarser["mean_level"], coarser["above_leaves"]
        for text in (
            f"level, mean over pictures: {levels['in']:.2f} trained on, {levels['out']:.2f} held out; "
            f"above the leaves: {above['in']:.1%} and {above['out']:.1%}",
            f"that held-out pictures go to coarser levels: p = {coarser['p_level']:.2g}; by the means of degradations, "
            f"whose pictures are much alike: p = {coarser['p_level_by_degradation']:.2g}",
        ):
            console.print(text, highlight=False)
