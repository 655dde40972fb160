"""``mirage analyze``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import device_named, reading_weights, require
from mirage.wording import counted

__all__ = ["analyze"]


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IN...", type=click.Path(path_type=Path))
@click.option("--weights", required=True, type=click.Path(path_type=Path), help="Checkpoint, or packaged weights.")
@click.option("--key", help="Which network, where the file holds several: params, state_dict_ema, net, ...")
@click.option("-o", "--out", "out_dir", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder for the figures.")  # fmt: skip
@click.option("--size", default=128, show_default=True, type=click.IntRange(min=16), help="Side of the square that is "
              "cut from the middle of each image, a multiple of 8.")  # fmt: skip
@click.option("--sigma", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Noise added, of 255.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the noise.")
@click.option("--limit", default=64, show_default=True, type=click.IntRange(min=1), help="Only the first images.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
def analyze(inputs: tuple[Path, ...], weights: Path, key: str | None, out_dir: Path, size: int, sigma: float, seed: int,
            limit: int, device: str, threads: int | None) -> None:  # fmt: skip
    """Draw the paper's Figures 3 to 6 of any weights on images: files, or all in folders.

    Figure 3: PCA and SVD of the channels at each scale. Figure 4: cosines between channels, and effective ranks.
    Figure 5: cosines between shallow and latent channels. Figure 6: similarity of shallow and latent embeddings of
    images. Each as PNG and CSV.
    """
    import torch
    from rich.console import Console

    require("evaluate", "PIL", "imagecodecs", "matplotlib")
    from mirage.analyze import draw
    from mirage.analyze.collect import analyze as collect
    from mirage.restore import load_model

    if size % 8:
        raise click.BadParameter(f"expected a multiple of 8, got {size}", param_hint="--size")
    if threads:
        torch.set_num_threads(threads)
    with reading_weights():
        model = load_model(weights, fast=False, device=device_named(device), key=key)  # every module's output is there
    try:
        found = collect(model, _images(inputs, size, sigma, seed, limit))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    files = draw.write(found, out_dir)
    _print(found, Console(width=None if sys.stdout.isatty() else 120))
    for path in files:
        click.echo(f"wrote {path}", err=True)


def _images(inputs: tuple[Path, ...], size: int, sigma: float, seed: int, limit: int) -> Iterator[Any]:
    """The middles of the images, with noise; smaller images are left out, and named."""
    import numpy as np

    from mirage.evaluate.noise import add_noise, noise_generator
    from mirage.evaluate.run import read_rgb
    from mirage.inputs import photographs_in

    paths: list[tuple[Path, str]] = []
    for given in inputs:
        if given.is_dir():
            paths += [(path, path.relative_to(given).with_suffix("").as_posix())
                      for path in photographs_in(given, lambda *_: None)]  # fmt: skip
        else:
            paths.append((given, given.stem))
    taken = 0
    for path, name in paths:
        if taken == limit:
            return
        try:
            image = read_rgb(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        top, left = ((side - size) // 2 for side in image.shape[:2])
        if top < 0 or left < 0:
            pixels = f"{image.shape[1]}x{image.shape[0]} pixels"
            click.echo(f"left out {path}: {pixels} are less than --size {size}", err=True)
            continue
        taken += 1
        image = image[top : top + size, left : left + size]
        noisy = add_noise(image, sigma, noise_generator(seed, name)) if sigma else image
        yield noisy.astype(np.float32)


def _print(found: Any, console: Any) -> None:
    from rich import box
    from rich.table import Table

    from mirage.analyze.draw import PAPER_SIMILARITY, paper_rank

    title = f"Channels over {counted(found.images, 'image')}: effective ranks, and cosines of channels"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("place")
    heads = ("channels", "90% of variance", "90% of energy", "paper (T)", "entropy rank", "mean |cosine|")
    for name in heads:
        table.add_column(name, justify="right")
    for place, each in found.spectra.items():
        table.add_row(place, str(each.channels), str(each.rank()), str(each.energy_rank()), paper_rank(place),
                      f"{each.entropy_rank:.1f}", f"{each.mean_similarity:.3f}")  # fmt: skip
    console.print(table)
    if found.embeddings is None:
        console.print("no SPD head in these weights: no Figure 6", style="yellow")
        return
    each = found.embeddings
    values = f"diagonal {each.diagonal:.4f}, off-diagonal {each.off_diagonal:.4f}, ratio {each.ratio:.3f}"
    console.print(f"shallow-latent similarity of images: {values}", highlight=False, soft_wrap=True)
    paper = "; ".join(f"{name} {off:.4f}, {ratio:g}" for name, (off, ratio) in PAPER_SIMILARITY.items())
    line = f"the paper's, on deraining (off-diagonal, ratio): {paper}"
    console.print(line, style="dim", highlight=False, soft_wrap=True)
