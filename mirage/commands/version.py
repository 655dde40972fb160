"""``mirage version``."""

from __future__ import annotations

import click

__all__ = ["version"]


@click.command()
def version() -> None:
    """Print the versions of this package, PyTorch and Python."""
    import platform

    import torch

    from mirage.doctor import package_version

    click.echo(f"mirage-kernels {package_version()}, torch {torch.__version__}, Python {platform.python_version()}")
