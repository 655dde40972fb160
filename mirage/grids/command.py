"""``mirage grids``: the group of commands; each lies in a module of its own beside this one."""

from __future__ import annotations

import click

from mirage.grids.calibrate_command import calibrate
from mirage.grids.restore_command import restore
from mirage.grids.search_command import search
from mirage.grids.similarity_command import similarity
from mirage.grids.train_command import train

__all__ = ["grids"]


@click.group()
def grids() -> None:
    """Group degradations that can share a network, train one for each group, restore with the nearest (GRIDS)."""


grids.add_command(calibrate)
grids.add_command(restore)
grids.add_command(search)
grids.add_command(similarity)
grids.add_command(train)
