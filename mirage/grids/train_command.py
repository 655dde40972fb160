"""``mirage grids train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import FILE, FOLDER, KEY, STOPPED, THERE, device_named, reading_weights, stopping
from mirage.grids.command_parts import train_options, trainer_of, training_progress, trainings_of

__all__ = ["train"]


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", required=True, help="Of mirage train, such as grids-tiny, with KEY=VALUE in the place of "
              "its values.")  # fmt: skip
@click.option("--groups", "groups_path", type=THERE, help="What mirage grids search wrote.")
@click.option("--group", "groups", multiple=True, metavar="GB+MB", help="A group, in the place of --groups. "
              "Repeatable.")  # fmt: skip
@click.option("--similarity", required=True, type=THERE, help="similarity.json of mirage grids similarity: how images "
              "are told apart.")  # fmt: skip
@click.option("--weights", type=FILE, help="Of the descriptor that the similarities were measured by.  "
              "[default: descriptor-srresnet]")  # fmt: skip
@KEY
@click.option("--foreign", default=4.0, show_default=True, help="Distance above which an image is foreign to all "
              "groups.")  # fmt: skip
@click.option("-o", "--out", required=True, type=FOLDER, help="Folder of the groups' networks, for mirage grids "
              "restore.")  # fmt: skip
@train_options
def train(overrides: tuple[str, ...], config: str, groups_path: Path | None, groups: tuple[str, ...], similarity: Path,
          weights: Path | None, key: str | None, foreign: float, out: Path, **training: Any) -> None:  # fmt: skip
    """Train a network for each group, and gather what mirage grids restore needs in one folder.

    Networks that a search has trained, with the same --config and --folder, are used as they are; a training that was
    stopped goes on.

    \b
        mirage grids train --config grids-tiny --groups groups.json --similarity similarity.json -o networks
    """
    if (groups_path is None) == (not groups):
        raise click.UsageError("expected one of --groups and --group")
    from rich.console import Console

    from mirage.grids.descriptor import DEFAULT_WEIGHTS, SRResNetDescriptor
    from mirage.grids.groups import check_groups, group_name, parse_group
    from mirage.grids.matrix import SimilarityMatrix
    from mirage.grids.restorer import GroupedRestorer, RestorerGroup
    from mirage.grids.search import load_grouping
    from mirage.grids.trained import TrainingFailed

    trainer = trainer_of(config, overrides)
    console = Console(stderr=True)
    try:
        found = SimilarityMatrix.load(similarity)
        if groups_path is not None:
            members = [tuple(group) for group in load_grouping(groups_path).groups]
        else:
            chosen = [parse_group(text, found.names) for text in groups]
            members = [tuple(name for name in found.names if name in group) for group in chosen]
        check_groups(members, [name for group in members for name in group])
        for group in members:
            parse_group(group_name(group), found.names)
            parse_group(group_name(group), trainer.degradations)
        with reading_weights():
            device = device_named(training["device"])
            descriptor = SRResNetDescriptor.from_weights(weights or DEFAULT_WEIGHTS, key=key, device=device)
        performance = trainings_of(trainer, **training)
        sets = [frozenset(group) for group in members]
        with stopping(), training_progress(performance, console):
            measured = performance.measure(sets) if training["test"] is not None else [None] * len(sets)
            files = performance.weights_of(sets)
        parts = [
            RestorerGroup({name: found.ggds[name] for name in group}, file, values or {})
            for group, file, values in zip(members, files, measured, strict=True)
        ]
        settings = {"crops": found.settings["patches"], "components": found.settings["components"]}
        restorer = GroupedRestorer(parts, descriptor, patch=found.settings["patch"], foreign=foreign, **settings)
        restorer.save(out)
    except KeyboardInterrupt:
        click.echo("stopped; what was trained is kept, and the same command goes on from here", err=True)
        sys.exit(STOPPED)
    except KeyError as error:
        raise click.ClickException(f"{similarity}: its settings have no {error.args[0]}") from error
    except (OSError, ValueError, TrainingFailed) as error:
        raise click.ClickException(str(error)) from error
    for part in parts:
        values = "  ".join(f"{name} {value:.2f} dB" for name, value in part.psnr.items())
        click.echo(f"{part.name:24s} {values}".rstrip())
    click.echo(f"wrote {out}", err=True)
