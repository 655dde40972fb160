"""``mirage unirestorer experts``."""

from __future__ import annotations

from pathlib import Path

import click

from mirage.commands.common import require
from mirage.unirestorer.command_parts import CONFIG, OVERRIDES, SYSTEM, check_data, config_of, told

__all__ = ["experts"]


@click.command()
@OVERRIDES
@CONFIG
@SYSTEM
@click.option("--lora", "rank", type=click.IntRange(min=1), help="Rank of what all but the root add to the root's "
              "weights; without it each has a network of its own.")  # fmt: skip
@click.option("--alpha", default=16.0, show_default=True, help="Of LoRA: what is added is multiplied by alpha / rank.")
@click.option("--norms/--no-norms", default=True, show_default=True, help="Of LoRA: norms and temperatures, too.")
@click.option("--level-steps", help="Optimizer steps of each level's experts, from the root on, such as "
              '"16000 6000 2000".  [default: schedule.steps for all]')  # fmt: skip
@click.option("--nodes", help="These alone, such as 0,3,4.  [default: all that are not there yet]")
@click.option("--workers", type=click.IntRange(min=1), help="Experts trained at a time.  [default: one a GPU, else 1]")
@click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]),
              help="Processes of this machine, or a cluster of Ray that all reaches --system.")  # fmt: skip
@click.option("--address", help="Ray: the cluster, such as auto.  [default: RAY_ADDRESS, else this machine]")
def experts(
    overrides: tuple[str, ...], config: str, folder: Path, rank: int | None, alpha: float, norms: bool,
    level_steps: str | None, nodes: str | None, workers: int | None, engine: str, address: str | None,
) -> None:  # fmt: skip
    """Train an expert for each node of the tree, on the node's samples, as a configuration says.

    Each trains for the same number of steps, or those of a level do. The fewer steps the root has had, the less there
    is in it for pictures that no leaf knows. A training that was stopped goes on; experts that are there stay.

    \b
        mirage unirestorer experts --config unirestorer-tiny data.root=/datasets --system system
    """
    require("unirestorer", "filelock")
    from rich.console import Console

    from mirage.grids.command_parts import training_progress
    from mirage.grids.workers import Workers
    from mirage.unirestorer.expert_training import ExpertTrainings, TrainExpert, parse_steps
    from mirage.unirestorer.folder import SystemFolder
    from mirage.unirestorer.lora import LoRASettings

    chosen = config_of(config, overrides)
    place = SystemFolder(folder)
    with told():
        tree = place.tree()
        check_data(chosen, place)
        lora = None if rank is None else LoRASettings(rank, alpha, norms)
        train = TrainExpert(chosen, lora, level_steps=None if level_steps is None else parse_steps(level_steps))
        trainings = ExpertTrainings(place.experts_folder, tree, train, workers=Workers(workers, engine, address))
        wanted = None if nodes is None else [_node(text, len(tree)) for text in nodes.replace(",", " ").split()]
        with training_progress(trainings, Console(stderr=True)):
            files = trainings.run(wanted)
    for file in files:
        click.echo(str(file))


def _node(text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise ValueError(f"--nodes: expected numbers from 0 to {count - 1}, got {text!r}")
    return int(text)
