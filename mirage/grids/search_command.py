"""``mirage grids search``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import FILE, STOPPED, THERE, stopping
from mirage.grids.command_parts import split_names, train_options, trainer_of, training_progress, trainings_of
from mirage.wording import counted

__all__ = ["search"]

QUESTIONS = {"size": "the most alike group of {n}", "rank": "place {place} of the groups of {n}",
             "cover": "a solution with at most {n} groups", "verify": "a group of a solution with {n}"}  # fmt: skip


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--table", help="Performances that are there: JSON or CSV, or published:restormer, published:srresnet.")
@click.option("--config", help="Train what is needed, as this configuration of mirage train says, with KEY=VALUE in "
              "the place of its values; such as grids-tiny.")  # fmt: skip
@click.option("--similarity", type=THERE, help="What mirage grids similarity wrote (.json, .csv): trainings go along "
              "its ranking. Without it the groups whose performance is known are all that is considered.")  # fmt: skip
@click.option("--degradations", help="What to divide, such as GB,MB,SP.  [default: all of the similarities', the "
              "configuration's or the table's]")  # fmt: skip
@click.option("--delta", default=0.7, show_default=True, help="dB that a degradation may lose by sharing a network.")
@click.option("--bucket", default=0.05, show_default=True, help="Mean similarities that round to the same multiple of "
              "this are equal.")  # fmt: skip
@click.option("--symmetric", is_flag=True, help="Rank by the mean of the similarities and their transpose.")
@click.option("--exact", is_flag=True, help="Solutions of exactly as many groups as the bisection is at.")
@click.option("-o", "--out", type=FILE, help="Write the groups here (JSON), for mirage grids train.")
@click.option("--write-table", type=FILE, help="Write all performances that are known by then, .json or .csv.")
@train_options
def search(overrides: tuple[str, ...], table: str | None, config: str | None, similarity: Path | None,
           degradations: str | None, delta: float, bucket: float, symmetric: bool, exact: bool, out: Path | None,
           write_table: Path | None, **training: Any) -> None:  # fmt: skip
    """Find the fewest groups of degradations of which no member loses more than --delta dB by sharing a network.

    With --table nothing is trained. With --config networks are trained and measured, each once: the same command goes
    on where it was stopped, and searches with another --delta use what is there.

    \b
        mirage grids search --table published:restormer
        mirage grids search --config grids-tiny data.root=/datasets --test /datasets/CBSD68 --similarity similarity.json
    """
    if (table is None) == (config is None):
        raise click.UsageError("expected one of --table and --config")
    if config is not None and training["test"] is None:
        raise click.UsageError("--config needs --test, pictures that networks are measured on")
    if table is not None and overrides:
        raise click.UsageError(f"KEY=VALUE goes with --config, got {overrides[0]}")
    if table is not None and not table.startswith("published:") and not Path(table).is_file():
        raise click.UsageError(f"--table: no file {table!r}")
    from rich.console import Console

    from mirage.grids.performance import read_performance, write_performance
    from mirage.grids.search import search_groups
    from mirage.grids.trained import TrainingFailed

    performance: Any
    trained = None
    if config is not None:
        trainer = trainer_of(config, overrides)
        performance = trained = trainings_of(trainer, **training)
    console = Console(stderr=True)
    try:
        ranking = None if similarity is None else _ranking(similarity, split_names(degradations), bucket, symmetric)
        if table is not None:
            performance = read_performance(table)
        known = performance.degradations if table is not None else trainer.degradations
        names = split_names(degradations) or (known if ranking is None else ranking.degradations)
        _check(names, known, table or config or "")
        with stopping(), training_progress(trained, console):
            found = search_groups(names, performance, delta, ranking, exact, lambda step: _tell(step, trained, console))
    except KeyboardInterrupt:
        click.echo("stopped; what was trained is kept, and the same command goes on from here", err=True)
        sys.exit(STOPPED)
    except (OSError, ValueError, TrainingFailed) as error:
        raise click.ClickException(str(error)) from error
    _print(found, Console(width=None if sys.stdout.isatty() else 120))
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if out is not None:
        found.save(out)
        click.echo(f"wrote {out}", err=True)
    if write_table is not None:
        write_performance(performance, write_table, names)
        click.echo(f"wrote {write_table}", err=True)


def _check(names: tuple[str, ...], known: tuple[str, ...], where: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"degradations: {where} has {', '.join(known)}, got {', '.join(map(repr, unknown))}")


def _ranking(path: Path, names: tuple[str, ...] | None, bucket: float, symmetric: bool) -> Any:
    """The ranking of a file of similarities, of all its degradations or of some."""
    import numpy as np

    from mirage.grids.groups import rank_groups

    all_names, matrix = read_similarities(path)
    chosen = all_names if names is None else names
    _check(chosen, all_names, str(path))
    places = [all_names.index(name) for name in chosen]
    return rank_groups(chosen, matrix[np.ix_(places, places)], bucket=bucket, symmetric=symmetric)


def read_similarities(path: Path) -> tuple[tuple[str, ...], Any]:
    """Names and matrix of a file that ``mirage grids similarity`` wrote.

    Raises:
        OSError, ValueError: it cannot be read, or is something else.
    """
    import csv

    import numpy as np

    if path.suffix.lower() != ".csv":
        from mirage.grids.matrix import SimilarityMatrix

        found = SimilarityMatrix.load(path)
        return found.names, found.values
    rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    names = tuple(name.strip() for name in rows[0][1:]) if rows else ()
    try:
        if not names or [row[0].strip() for row in rows[1:]] != list(names):
            raise ValueError("expected a row and a column for each degradation, by name, in the same order")
        matrix = np.array([[float(value) for value in row[1:]] for row in rows[1:]])
        if matrix.shape != (len(names), len(names)):
            raise ValueError(f"expected {len(names)} numbers in each row")
    except ValueError as error:
        raise ValueError(f"{path}: not readable as similarities: {error}") from error
    return names, matrix


def _tell(step: Any, trained: Any, console: Any) -> None:
    """A line for each answer as it comes, where that takes its time."""
    if trained is None:
        return
    question = QUESTIONS[step.stage].format(n=step.number, place=step.place)
    what = f", {step.group}, {step.drop:.2f} dB" if step.group else ""
    how = " (trained)" if step.trained else ""
    console.print(f"{question}{what}: {'yes' if step.passed else 'no'}{how}", markup=False, highlight=False)


def _print(found: Any, console: Any) -> None:
    from rich import box
    from rich.table import Table

    trace = Table(title="Trace", box=box.SIMPLE_HEAD)
    for head, side in (("question", "left"), ("group", "left"), ("loss, dB", "right"), ("answer", "left")):
        trace.add_column(head, justify=side)  # type: ignore[arg-type]
    for step in found.trace:
        question = QUESTIONS[step.stage].format(n=step.number, place=step.place)
        drop = f"{step.drop:.2f}" if step.group else ""
        trace.add_row(question, step.group, drop, ("yes" if step.passed else "no") + (", trained" * step.trained))
    console.print(trace)
    groups = Table(title="Groups", box=box.SIMPLE_HEAD)
    groups.add_column("group")
    groups.add_column("largest loss, dB", justify="right")
    for members in found.groups:
        name = "+".join(members)
        groups.add_row(" ".join(members), f"{found.drops[name]:.2f}")
    console.print(groups)
    trainings = ", ".join(f"{count} {name}" for name, count in found.trainings.items())
    console.print(f"{counted(len(found.groups), 'group')} of {counted(len(found.degradations), 'degradation')}, at "
                  f"most {found.delta:g} dB each; compression {found.compression:.1%}; trainings: {trainings}",
                  highlight=False)  # fmt: skip
