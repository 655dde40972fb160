"""``mirage train``: training, and what belongs to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import require
from mirage.wording import counted

__all__ = ["train"]


class _Commands(click.Group):
    """A group whose first argument may also be a configuration: ``train CONFIG ...`` is ``train run CONFIG ...``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Commands, subcommand_metavar="CONFIG [KEY=VALUE]... | COMMAND [ARGS]...")
def train() -> None:
    """Train a network as CONFIG says, with KEY=VALUE in the place of its values.

    CONFIG is a YAML file, or the name of one inside the package (`mirage train configs` lists them). A run that was
    interrupted goes on where it stopped when it is started again. Ctrl-C and SIGTERM write a checkpoint first.

        mirage train 3deg-tiny data.root=/datasets output.folder=runs/3deg
    """


@train.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def run(config: str, overrides: tuple[str, ...]) -> None:
    """Train as CONFIG says; what `mirage train CONFIG` does."""
    require("train", "lightning_fabric", "yaml", "PIL", "fsspec", "braceexpand")
    from mirage.checkpoint import CheckpointError
    from mirage.train import ConfigError, Interrupted, Run, load_config

    try:
        training = Run(load_config(config, overrides))
    except (ConfigError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    except (CheckpointError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    count = sum(p.numel() for p in training.network.parameters() if p.requires_grad)
    training.fabric.print(
        f"{count:,} weights, {counted(training.data.epoch, 'sample')} an epoch, "
        f"{counted(training.rates.steps, 'step')}; "
        + (f"goes on from {training.resumed}" if training.resumed else f"writes to {training.config.output.folder}")
    )
    for change in training.changes:
        training.fabric.print(f"changed since: {change}")
    try:
        training.train()
    except Interrupted as stop:
        if training.fabric.global_rank > 0:  # the first process would take an error here as a reason to be ended
            return
        click.echo(str(stop), err=True)
        sys.exit(130)
    except (FloatingPointError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@train.command()
def configs() -> None:
    """List the configurations inside the package."""
    from mirage.train.config import packaged

    for name, path in packaged().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        click.echo(f"{name:24s} {first.lstrip('# ')}")


@train.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in the place of a table.")
def ablations(as_json: bool) -> None:
    """Print the ablations of Tables 7 and C: their switches, and our parameter counts beside the printed ones."""
    import dataclasses
    import json

    from mirage.train.ablations import parameter_table

    rows = parameter_table()
    if as_json:
        click.echo(json.dumps([{**dataclasses.asdict(a), "parameters": count} for a, count in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    columns = ("model.ablation", "row", "paper, M", "here, M", "PSNR", "SSIM", "note")
    table = Table(*columns, title="Tables 7 and C, MIRAGE-T")
    for a, count in rows:
        numbers = (f"{a.printed:.2f}", f"{count / 1e6:.2f}", f"{a.psnr:.2f}", f"{a.ssim:.3f}"[1:])
        table.add_row(a.name or "-", a.row, *numbers, a.note)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    click.echo("PSNR and SSIM are the paper's. A branch is left out by splitting the channels among the others.")


@train.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True)
@click.option("--now", is_flag=True, help="The present weights in the place of the averaged ones.")
@click.option("--card", type=click.Path(dir_okay=False, path_type=Path), help="Also write a model card (Markdown).")
@click.option("--data", help="For the card: what the weights were trained on.  [default: the sets' folders]")
@click.option("--licence", default="not stated", help="For the card: what may be done with them.")
@click.option("--results", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="For the card: a file (Markdown) that tells what they reach.")  # fmt: skip
def export(checkpoint: Path, output: Path, dtype: str, now: bool, card: Path | None, **texts: Any) -> None:
    """Write the weights of CHECKPOINT (a file, or a run's folder) to OUTPUT, a .safetensors file.

    Only weights, of the average where there is one: what `mirage restore --weights` reads.
    """
    from mirage.checkpoint import CheckpointError
    from mirage.train.export import export_weights, model_card
    from mirage.whole_files import write_whole

    try:
        state = export_weights(checkpoint, output, dtype=dtype, average=not now)
        click.echo(f"wrote {output}: step {state.step}, {output.stat().st_size / 1e6:.1f} MB")
        if card is not None:
            sets = state.config.get("data", {}).get("sets", [])
            data = texts["data"] or ", ".join(str(s.get("shards") or s.get("degraded") or s.get("clean")) for s in sets)
            results = texts["results"].read_text(encoding="utf-8") if texts["results"] else ""
            about = {"data": data, "licence": texts["licence"], "results": results}
            text = model_card(state, output.name, **about, average=not now)
            write_whole(card, text.encode("utf-8"))
            click.echo(f"wrote {card}")
    except (CheckpointError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
