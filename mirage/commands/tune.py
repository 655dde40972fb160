"""``mirage tune``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mirage.commands.common import FILE, device_named
from mirage.wording import counted

if TYPE_CHECKING:
    from mirage.tune_cpu import Found

__all__ = ["tune"]

DTYPES = {"cuda": ("bfloat16",), "cpu": ("float32", "bfloat16")}
"""What is measured by default."""


@click.command()
@click.option("-o", "--output", required=True, type=FILE, help="The JSON file to write.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--variant", type=click.Choice(["tiny", "small"]), default="tiny", show_default=True)
@click.option("--size", "sizes", multiple=True, default=["224x224"], show_default=True, metavar="HxW",
              help="Height and width of the images; may be repeated.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "float16", "bfloat16"]),
              help="May be repeated.  [default: bfloat16; on a CPU float32 and bfloat16]")  # fmt: skip
@click.option("--step", is_flag=True, help="Training steps too.")
@click.option("--rounds", type=click.IntRange(min=1),
              help="On a CPU: turns of each instruction set, whose median counts.  [default: 7]")  # fmt: skip
def tune(output, device, variant, sizes, batch, dtypes, step, rounds):
    """Measure what is faster on this GPU or CPU; MIRAGE_TUNING=FILE uses it.

    On a GPU: warps and pipeline stages of each Triton kernel, and which of Triton and CUDA C++ each operator runs on.
    Minutes for each dtype. Results stay within rounding of those without the file: sums over a program's registers are
    added up in the order of its warps.

    On a CPU: the instruction set of the C++ kernels. Every one that the machine has runs the network, in turns; another
    than the built-in choice is taken where it is clearly faster. Results differ by rounding here too.
    """
    import re

    where = device_named(device)
    if where.type not in DTYPES:
        raise click.BadParameter(f"expected a CPU or a CUDA device, got {device!r}", param_hint="--device")
    shapes = []
    for size in sizes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
        if match is None:
            raise click.BadParameter(f"expected HxW, such as 224x224, got {size!r}", param_hint="--size")
        shapes.append((batch, 3, int(match[1]), int(match[2])))
    if not output.parent.is_dir():
        raise click.BadParameter(f"no folder {str(output.parent)!r}", param_hint="--output")
    if rounds is not None and where.type != "cpu":
        raise click.BadParameter(f"expected with --device cpu alone, got it with {where}", param_hint="--rounds")
    dtypes = tuple(dict.fromkeys(dtypes or DTYPES[where.type]))
    if where.type == "cpu":
        _tune_cpu(output, variant, tuple(dict.fromkeys(shapes)), dtypes, step, rounds)
    else:
        _tune_gpu(output, where, variant, shapes, dtypes, step)
    click.echo(f"wrote {output}; use it with MIRAGE_TUNING={output}")


def _tune_gpu(output, device, variant, shapes, dtypes, step):
    from contextlib import nullcontext

    import torch

    from mirage import tune as tuning

    try:
        with nullcontext() if device.index is None else torch.cuda.device(device):
            found, tuner, chooser = tuning.tune(variant, shapes, [getattr(torch, name) for name in dtypes], step)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found.save(output)
    saved = sum(built_in - best for built_in, best in tuner.times.values())
    total = sum(built_in for built_in, _ in tuner.times.values())
    click.echo(f"{counted(len(tuner.times), 'kind')} of launches, {len(found.launches)} of them faster otherwise: "
               f"one of each takes {total - saved:.3f} instead of {total:.3f} ms")  # fmt: skip
    click.echo(f"{counted(len(chooser.times), 'kind')} of calls, {len(found.choices)} of them faster in CUDA C++ than "
               "in Triton")  # fmt: skip


def _tune_cpu(output, variant, shapes, dtypes, step, rounds):
    from rich.console import Console

    from mirage import tune_cpu as tuning

    status = Console(stderr=True)
    try:
        found = tuning.tune_cpu(
            *(variant, shapes, dtypes, step, rounds or tuning.ROUNDS),
            on_step=lambda message: status.print(message, style="dim", highlight=False),
        )
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    found.tuning.save(output)
    _print_times(found, variant, shapes[0][0])


def _print_times(found: Found, variant: str, batch: int) -> None:
    """The table, what was chosen and why, and which dtypes do not pay."""
    from rich.console import Console
    from rich.table import Table

    from mirage.tune_cpu import BETTER, by_built_in, slower_than_float32

    chosen, built_in = found.tuning.isa, found.built_in
    shares = by_built_in(found.times, built_in)
    title = f"MIRAGE-{variant[0].upper()} on {found.tuning.device}, batch {batch}: milliseconds"
    table = Table("Case", title=title, title_justify="left")
    for isa in shares:
        table.add_column(f"{isa} (built in)" if isa == built_in else isa, justify="right")
    for case, times in found.times.items():
        table.add_row(str(case), *(f"{times[isa]:.2f}" for isa in shares))
    table.add_section()
    table.add_row("by the built-in one's", *(f"{share:.3f}" for share in shares.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if chosen != built_in:
        click.echo(f"chosen: {chosen}, which takes {shares[chosen]:.3f} of the time of {built_in}, the built-in choice")
    else:
        click.echo(f"chosen: {chosen}, the built-in choice" + (f"; no other takes at most {BETTER} of its time"
                   if len(shares) > 1 else ", the only one here"))  # fmt: skip
    for case, ratio in slower_than_float32(found.times, chosen).items():
        click.echo(f"{case} is slower than float32: {ratio:.2f} times its time with {chosen}")
