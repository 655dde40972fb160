"""``mirage unirestorer extract`` and ``retrieval``: train the small extractor, and measure any."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import FILE, FOLDER, STOPPED, device_named, reading_weights, require
from mirage.wording import counted

__all__ = ["extract", "retrieval"]


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", default="extractor-small", show_default=True, help="Of mirage train, such as "
              "extractor-small, with KEY=VALUE in the place of its values.")  # fmt: skip
@click.option("--margin", default=8, show_default=True, type=click.IntRange(min=0),
              help="Pixels of a degraded crop that the network does not see, on each side.")  # fmt: skip
@click.option("--temperature", default=0.1, show_default=True, type=click.FloatRange(min=0, min_open=True),
              help="Of the loss.")  # fmt: skip
@click.option("--related", default=0.5, show_default=True, type=click.FloatRange(0, 1),
              help="How right it is to take one strength of a type for another.")  # fmt: skip
@click.option("-o", "--out", type=FILE, help="The extractor, .safetensors, when the training is over.  [default: "
              "extractor.safetensors in output.folder]")  # fmt: skip
@click.option("--card", type=FILE, help="Also write a model card (Markdown).")
@click.option("--data", help="For the card: what it was trained on.  [default: the sets' folders]")
@click.option("--licence", default="not stated", help="For the card: what may be done with the weights.")
@click.option("--results", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="For the card: a file (Markdown) that tells what it reaches.")  # fmt: skip
def extract(overrides: tuple[str, ...], config: str, out: Path | None, card: Path | None, data: str | None,
            licence: str, results: Path | None, **settings: Any) -> None:  # fmt: skip
    """Train the small extractor to tell types and strengths of degradations, the names of the configuration's sets.

    A run that was interrupted goes on where it stopped when it is started again. Ctrl-C and SIGTERM write a checkpoint
    first. A run that is over writes its files again.

    \b
        mirage unirestorer extract data.root=/datasets output.folder=runs/extractor
    """
    require("train", "lightning_fabric", "yaml", "PIL", "fsspec", "braceexpand")
    import torch

    from mirage.checkpoint import CheckpointError
    from mirage.train import ConfigError, Interrupted, load_config
    from mirage.unirestorer.extractor_card import extractor_card
    from mirage.unirestorer.extractor_training import ExtractorRun
    from mirage.unirestorer.extractors import save_extractor
    from mirage.whole_files import write_whole

    if out is not None and out.suffix != ".safetensors":
        raise click.UsageError(f"--out: expected a name that ends in .safetensors, got {out}")
    try:
        run = ExtractorRun(load_config(config, overrides), **settings)
    except (ConfigError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    except (CheckpointError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    count = sum(p.numel() for p in run.network.parameters())
    run.fabric.print(
        f"{count:,} weights, {counted(len(run.labels), 'label')}, {counted(run.data.epoch, 'sample')} an epoch, "
        f"{counted(run.rates.steps, 'step')}; "
        + (f"goes on from {run.resumed}" if run.resumed else f"writes to {run.config.output.folder}")
    )
    for change in run.changes:
        run.fabric.print(f"changed since: {change}")
    target = out or Path(run.config.output.folder) / "extractor.safetensors"
    try:
        run.train()
        if run.fabric.global_rank == 0:
            save_extractor(run.extractor, target, dtype=torch.float16)
            click.echo(f"wrote {target}", err=True)
            if card is not None:
                named = data or ", ".join(dict.fromkeys(str(one.shards or one.clean) for one in run.config.data.sets))
                reached = results.read_text(encoding="utf-8") if results else ""
                text = extractor_card(run, target.name, data=named, licence=licence, results=reached)
                write_whole(card, text.encode("utf-8"))
                click.echo(f"wrote {card}", err=True)
    except Interrupted as stop:
        if run.fabric.global_rank > 0:  # the first process would take an error here as a reason to be ended
            return
        click.echo(str(stop), err=True)
        sys.exit(STOPPED)
    except (FloatingPointError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("pictures", type=FOLDER)
@click.option("--extractor", "name", default="extractor-small", show_default=True,
              help="Packaged weights, a file, clip:FILE or grids:FILE.")  # fmt: skip
@click.option("--view", type=click.Choice(["resize", "crops"]), help="What it sees of a picture.  [default: what is "
              "usual for it]")  # fmt: skip
@click.option("--config", default="extractor-small", show_default=True, help="Whose sets' names and degradations are "
              "told apart.")  # fmt: skip
@click.option("--count", default=8, show_default=True, type=click.IntRange(min=2), help="Crops of each label.")
@click.option("--size", default=128, show_default=True, type=click.IntRange(min=16), help="Side of a crop.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--plot", type=FILE, help="PNG: the embeddings in two dimensions.")
@click.option("--device", default="auto", show_default=True)
def retrieval(pictures: Path, name: str, view: Any, config: str, count: int, size: int, seed: int, plot: Path | None,
              device: str) -> None:  # fmt: skip
    """Degrade crops of PICTURES by each label's degradation, and tell how often the nearest crop of another picture is
    of the same type, and of the same type and strength.

    \b
        mirage unirestorer retrieval CBSD68
    """
    require("train", "yaml", "PIL")
    if plot is not None:
        require("unirestorer", "matplotlib", "sklearn")
    from mirage.train import ConfigError, load_config
    from mirage.unirestorer import load_extractor
    from mirage.unirestorer.retrieval import embed_all, labelled_images, measure_retrieval

    with reading_weights():
        found = load_extractor(name, view=view, device=device_named(device))
    try:
        crops = labelled_images(pictures, load_config(config).data, count, size, seed)
    except (ConfigError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    embeddings = embed_all(found, crops.images)
    measured = measure_retrieval(embeddings, crops.labels, crops.pictures)
    for label, part in measured.by_label.items():
        click.echo(f"{label:26s} {part:6.1%}   most often {measured.confused[label]}")
    tested = counted(len(crops.labels), "crop")
    click.echo(f"{tested}: type {measured.type:.1%}, type and strength {measured.label:.1%}")
    if plot is not None:
        from mirage.unirestorer.draw import embedding_map, write_figure

        write_figure(embedding_map(embeddings, {"degradation": crops.types}), plot)
        click.echo(f"wrote {plot}", err=True)
