"""``mirage tune``."""

from __future__ import annotations

import click

from mirage.commands.common import FILE, device_named
from mirage.wording import counted

__all__ = ["tune"]


@click.command()
@click.option("-o", "--output", required=True, type=FILE, help="The JSON file to write.")
@click.option("--variant", type=click.Choice(["tiny", "small"]), default="tiny", show_default=True)
@click.option("--size", "sizes", multiple=True, default=["224x224"], show_default=True, metavar="HxW",
              help="Height and width of the images; may be repeated.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=["bfloat16"], show_default=True,
              type=click.Choice(["float32", "float16", "bfloat16"]), help="May be repeated.")  # fmt: skip
@click.option("--step", is_flag=True, help="Training steps too.")
def tune(output, variant, sizes, batch, dtypes, step):
    """Measure what is faster on this GPU; MIRAGE_TUNING=FILE uses it.

    Warps and pipeline stages of each Triton kernel, and which of Triton and CUDA C++ each operator runs on. Minutes for
    each dtype. Results stay within rounding of those without the file: sums over a program's registers are
    added up in the order of its warps.
    """
    import re

    device_named("cuda")
    shapes = []
    for size in sizes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
        if match is None:
            raise click.BadParameter(f"expected HxW, such as 224x224, got {size!r}", param_hint="--size")
        shapes.append((batch, 3, int(match[1]), int(match[2])))
    if not output.parent.is_dir():
        raise click.BadParameter(f"no folder {str(output.parent)!r}", param_hint="--output")
    import torch

    from mirage import tune as tuning

    try:
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
    click.echo(f"wrote {output}; use it with MIRAGE_TUNING={output}")
