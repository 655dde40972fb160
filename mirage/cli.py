"""The ``mirage`` command. Each subcommand imports what it needs when it runs, so that ``mirage --help`` is quick.

A command lies in `mirage.commands`, or in a module ``command`` of the package that does its work.
"""

from __future__ import annotations

import click

from mirage.analyze.command import analyze
from mirage.commands.doctor import doctor
from mirage.commands.export import export
from mirage.commands.table6 import table6
from mirage.commands.tune import tune
from mirage.commands.version import version
from mirage.degradations.command import degrade
from mirage.demo.command import demo
from mirage.evaluate.command import evaluate
from mirage.grids.command import grids
from mirage.restore.command import restore
from mirage.train.command import train
from mirage.unirestorer.command import unirestorer

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """MIRAGE, all-in-one image restoration: measure it, restore images with it, check the installation."""


main.add_command(analyze)
main.add_command(degrade)
main.add_command(demo)
main.add_command(doctor)
main.add_command(evaluate)
main.add_command(export)
main.add_command(grids)
main.add_command(restore)
main.add_command(table6)
main.add_command(train)
main.add_command(tune)
main.add_command(unirestorer)
main.add_command(version)


if __name__ == "__main__":
    main()
