"""What the commands of ``mirage grids`` that train share: options, what they make, and progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mirage.commands.common import FOLDER, require

if TYPE_CHECKING:
    from mirage.grids.trained import TrainAndMeasure
    from mirage.grids.training import TrainGroup

__all__ = ["split_names", "train_options", "trainer_of", "training_progress", "trainings_of"]

LOOK = 1.0  # seconds between looks at the trainers' logs

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = (
    click.option("--folder", type=FOLDER, help="Of the trainings: a folder for each group, which other searches go on "
                 "with.  [default: the configuration's output.folder]"),
    click.option("--test", type=FOLDER, help="Clean pictures that networks are measured on."),
    click.option("--crop", default=128, show_default=True, type=click.IntRange(min=0),
                 help="Side of what is measured, of the middle of the test pictures; 0: whole pictures."),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first test pictures."),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the test degradations."),
    click.option("--workers", type=click.IntRange(min=1),
                 help="Groups trained at a time.  [default: one a GPU, else 1]"),
    click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]),
                 help="Processes of this machine, or a cluster of Ray that all reaches --folder."),
    click.option("--address", help="Ray: the cluster, such as auto.  [default: RAY_ADDRESS, else this machine]"),
    click.option("--device", default="auto", show_default=True, help="That measures: auto, cpu, cuda, ..."),
)  # fmt: skip


def train_options(command: Command) -> Command:
    """Add the options of training and measuring to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def split_names(text: str | None) -> tuple[str, ...] | None:
    """The names in ``"GB, MB RL"``."""
    return None if text is None else tuple(text.replace(",", " ").split())


def trainer_of(config: str, overrides: tuple[str, ...]) -> TrainGroup:
    """What trains as a configuration says.

    Raises:
        click.UsageError: the configuration is wrong.
    """
    require("train", "lightning_fabric", "yaml", "PIL", "fsspec", "braceexpand")
    from mirage.grids.training import TrainGroup
    from mirage.train import ConfigError, load_config

    try:
        return TrainGroup(load_config(config, overrides))
    except (ConfigError, FileNotFoundError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def trainings_of(
    train: TrainGroup, folder: Path | None, test: Path | None, crop: int, limit: int | None, seed: int, device: str,
    *, workers: int | None, engine: str, address: str | None,
) -> TrainAndMeasure:  # fmt: skip
    """The trainings in a folder.

    Raises:
        click.ClickException: the folder holds others, there are no test pictures, or Ray is not installed.
    """
    require("grids", "filelock")
    from mirage.grids.trained import TrainAndMeasure
    from mirage.grids.training import MeasureGroup
    from mirage.grids.workers import Workers

    try:
        kinds = tuple(train.kinds.items())
        measure = None if test is None else MeasureGroup(str(test), crop or None, limit, seed, device, kinds)
        return TrainAndMeasure(
            folder or Path(train.config.output.folder), train, measure, workers=Workers(workers, engine, address)
        )
    except (ImportError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def training_progress(performance: Any, console: Any) -> Iterator[None]:
    """A bar for each group that is being trained, by the steps that trainers tell in their logs.

    Args:
        performance: a `mirage.grids.TrainAndMeasure`, or what calls ``on_begin`` and ``on_done`` and has ``step_of``
            and ``steps_of`` as that does; None: no bars.
    """
    if performance is None:
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, Any] = {}
    ended = threading.Event()
    with Progress(*columns, console=console, transient=True) as progress:

        def begin(name: str) -> None:
            bars[name] = progress.add_task(name, total=performance.steps_of(name))

        def done(name: str) -> None:
            progress.remove_task(bars.pop(name))

        def look() -> None:
            while not ended.wait(LOOK):
                for name, bar in list(bars.items()):
                    progress.update(bar, completed=performance.step_of(name))

        performance.on_begin, performance.on_done = begin, done
        thread = threading.Thread(target=look, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
