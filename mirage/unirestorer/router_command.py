"""``mirage unirestorer router``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from mirage.unirestorer.command_parts import CONFIG, OVERRIDES, SYSTEM, config_of, told

__all__ = ["router"]


@click.command()
@OVERRIDES
@CONFIG
@SYSTEM
@click.option("--variance", default="affine", show_default=True, type=click.Choice(["affine", "log", "literal"]),
              help="How the second head's output stands for a variance.")  # fmt: skip
@click.option("--balance", default="levels", show_default=True, type=click.Choice(["levels", "leaves", "both"]),
              help="Of what probabilities shall be even.")  # fmt: skip
@click.option("--objective", default="gate", show_default=True, type=click.Choice(["gate", "expected"]),
              help="What teaches levels: the chosen one's error, as released; or the errors of all, each image "
                   "restored on every level.")  # fmt: skip
@click.option("--centre-weight", default=0.1, show_default=True, help="Of the loss of embeddings and their centres.")
@click.option("--balance-weight", type=float, help="Of the loss of balance.  [default: 0.01; 0 with the objective "
              "expected]")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Such as 2G: for the weights of experts; those not used for longest go.")
def router(overrides: tuple[str, ...], config: str, folder: Path, memory: str | None, **settings: Any) -> None:
    """Train the router; extractor and experts do not change.

    Its data need not be the tree's. A training that was stopped goes on. train.csv tells the loss and how often each
    level was chosen, usage.csv, at each validation, how often each expert was; one that got less than 1% of its share
    is warned about.

    \b
        mirage unirestorer router --config unirestorer-router data.root=/datasets --system system
    """
    from mirage.train import Interrupted
    from mirage.unirestorer.folder import SystemFolder
    from mirage.unirestorer.router_training import RouterRun, RouterSettings, save_router

    chosen = config_of(config, overrides)
    place = SystemFolder(folder)
    chosen = dataclasses.replace(chosen, output=dataclasses.replace(chosen.output, folder=str(place.router_run)))
    with told():
        made = RouterSettings(**settings)
        device = "cpu" if chosen.trainer.accelerator == "cpu" else "auto"
        run = RouterRun(chosen, place.extractor(), place.tree(), place.experts(memory=memory, device=device), made)
        if run.resumed is not None:
            click.echo(f"goes on from {run.resumed}", err=True)
        for line in run.changes:
            click.echo(f"changed: {line}", err=True)
        try:
            run.train()
        except Interrupted as error:
            raise KeyboardInterrupt from error
        save_router(run.router, place.router_file, made)
    click.echo(f"wrote {place.router_file}", err=True)
