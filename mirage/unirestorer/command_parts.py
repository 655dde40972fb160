"""What the commands of ``mirage unirestorer`` share: options, configurations, and errors in the place of tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mirage.commands.common import FOLDER, STOPPED, require, stopping

if TYPE_CHECKING:
    from mirage.train.config import Config
    from mirage.unirestorer.folder import SystemFolder

__all__ = ["CONFIDENCE", "CONFIG", "OVERRIDES", "SYSTEM", "check_data", "config_of", "told"]

SYSTEM = click.option("--system", "folder", required=True, type=FOLDER, help="Folder that the stages fill.")
CONFIDENCE = click.option(
    "--confidence",
    metavar="C",
    type=click.FloatRange(0, 1, min_open=True),
    help="Above 0, at most 1: an image goes to the finest node on its leaf's path whose leaves have so much of the "
    "probability together.  [default: the router says the level]",
)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
CONFIG = click.option("--config", required=True, help="Of mirage train, such as unirestorer-tiny, with KEY=VALUE in "
                      "the place of its values.")  # fmt: skip


def config_of(config: str, overrides: tuple[str, ...]) -> Config:
    """A configuration of `mirage.train`.

    Raises:
        click.UsageError: it is wrong.
    """
    require("train", "lightning_fabric", "yaml", "PIL", "fsspec", "braceexpand")
    from mirage.train import ConfigError, load_config

    try:
        return load_config(config, overrides)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def check_data(config: Config, folder: SystemFolder) -> None:
    """Refuse a configuration of other samples than the tree's, whose members are numbers of these.

    Raises:
        ValueError: data or seed differ; the message says where.
    """
    from mirage.grids.settings import differences
    from mirage.unirestorer.samples import data_identity

    found = differences(folder.samples()["data"], data_identity(config), "data")
    if found:
        raise ValueError(
            f"{folder.samples_file}: the tree is of other samples ({'; '.join(found[:3])}); give the configuration "
            "that cluster was given"
        )


@contextmanager
def told() -> Iterator[None]:
    """Errors of a stage as those of the command; a stage that is told to stop says how to go on."""
    from mirage.grids.trained import TrainingFailed

    failures: tuple[Any, ...] = (OSError, ValueError, ImportError, FloatingPointError, TrainingFailed)
    try:
        with stopping():
            yield
    except KeyboardInterrupt:
        click.echo("stopped; what was reached is kept, and the same command goes on from here", err=True)
        sys.exit(STOPPED)
    except failures as error:
        raise click.ClickException(str(error)) from error
