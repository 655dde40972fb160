"""``mirage export``."""

from __future__ import annotations

from pathlib import Path

import click

from mirage.commands.common import KEY, WEIGHTS, reading_weights

__all__ = ["export"]


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@WEIGHTS
@KEY
def export(output, weights, key):
    """Write the weights of a checkpoint to OUTPUT, a .safetensors file.

    What csrc/examples/ reads, a program in C++ that restores photographs without Python.
    """
    from mirage.checkpoint import from_checkpoint, save_checkpoint
    from mirage.restore import resolve_weights

    with reading_weights():
        save_checkpoint(from_checkpoint(resolve_weights(weights), key=key), output)
    click.echo(f"wrote {output}")
