"""``mirage table6``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirage.commands.common import FILE, FOLDER, device_named, require

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["table6"]


@click.command()
@click.option("--image", type=FILE, help="Photograph for the forward pass.  [default: scikit-image's astronaut]")
@click.option("--size", default=224, show_default=True, help="Side of the centre-cropped, resized input in pixels.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(min=1), help="Timed passes of each row.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(["T", "S", "PromptIR", "AdaIR", "MoCE-IR-S", "MoCE-IR", "Restormer", "NAFNet"]),
    help="Only this model.  [default: T and S]",
)
@click.option("--all", "every", is_flag=True, help="Every model that can be built here, and why others cannot.")
@click.option(
    "--code",
    type=FOLDER,
    help="Folder with checkouts of AdaIR and MoCE-IR, whose rows their authors' code is run for. Trust it first.",
)
@click.option(
    "--implementation",
    "implementations",
    multiple=True,
    type=click.Choice(["reference", "fast"]),
    help="Only these modules.",
)
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "tracker", "cuda", "fake"]),
    help="How memory is found; 'fake' estimates it without allocating (a training pass takes up to 10 GiB).",
)
@click.option("--json", "json_path", type=FILE, help="Also write the rows as JSON.")
@click.option("--csv", "csv_path", type=FILE, help="Also write the rows as CSV.")
@click.option("--plot", "plot_path", type=FILE, help="Also draw memory and time as bars (.png, .svg, .pdf).")
def table6(threads, every, device, json_path, csv_path, plot_path, **options):
    """Print the paper's Table 6 beside what this machine measures.

    Parameters in millions, multiply-adds of one forward pass in 1e9, peak memory of one training-mode forward pass in
    MiB, time of one evaluation-mode forward pass in seconds; batch 1.
    """
    import torch
    from rich.console import Console

    require("table6", "PIL", *(() if options["image"] else ("skimage",)), *(("matplotlib",) if plot_path else ()))
    from mirage import table6 as table

    if threads:
        torch.set_num_threads(threads)
    status = Console(stderr=True)
    options["variants"] = _chosen(options["variants"], every, options["code"], status)
    options["implementations"] = options["implementations"] or table.IMPLEMENTATIONS
    try:
        result = table.run(
            **options,
            device=str(device_named(device)),
            on_step=lambda message: status.print(message, style="dim", highlight=False),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _print_table(result)
    for path, write in ((json_path, table.write_json), (csv_path, table.write_csv), (plot_path, table.plot)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(result, path)
            status.print(f"wrote {path}", style="dim")


def _chosen(variants: tuple[str, ...], every: bool, code: Path | None, status: Console) -> tuple[str, ...]:
    """What is to be measured; of what `--all` leaves out the reasons are told."""
    from mirage import table6 as table

    if not every:
        return variants or table.VARIANTS
    if variants:
        raise click.UsageError("--all: expected without --variant")
    absent = table.not_built(code)
    for name, reason in absent.items():
        status.print(f"without {name}: {reason}", style="dim", highlight=False, markup=False)
    return tuple(variant for variant, method in table.METHODS.items() if method.name not in absent)


def _print_table(result) -> None:
    from rich.console import Console

    from mirage import table6 as table

    table.render(result, Console(width=None if sys.stdout.isatty() else 120))
