"""An evaluation as tables on a terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mirage.evaluate.metrics import METRICS
from mirage.evaluate.protocols import Column, Protocol
from mirage.evaluate.results import Failure
from mirage.evaluate.run import Average, Evaluation
from mirage.whole_files import write_whole
from mirage.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["render", "write_csv"]


def render(evaluation: Evaluation, console: Console, protocol: Protocol | None = None, paper: bool = True) -> None:
    """Print the averages, with ``protocol`` the paper's table with them as its last rows, and all definitions.

    Args:
        paper: print the published rows too.
    """
    console.print(_table_of_averages(evaluation))
    if protocol is not None:
        console.print(_table_of_paper(evaluation, protocol, paper))
    for line in _definitions(evaluation):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    for note in evaluation.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if protocol is not None:
        for note in _not_the_papers(evaluation, protocol):
            console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for failure in evaluation.failures:
        where = f"{failure.set}{_what(failure)} {failure.image}"
        console.print(f"failed: {failure.method}: {where}: {failure.error}", style="red", markup=False, soft_wrap=True)


def _table_of_averages(evaluation: Evaluation) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="Averages over images", box=box.SIMPLE_HEAD)
    for name in ("set", "method"):
        table.add_column(name)
    for name in ("images", *evaluation.metrics, "s/image"):
        table.add_column(name, justify="right")
    for each in evaluation.averages:
        images = f"{each.images}" if each.images == each.of else f"{each.images} of {each.of}"
        values = [f"{each.values[name]:.{METRICS[name].digits}f}" for name in evaluation.metrics]
        table.add_row(f"{each.set}{_what(each)}", each.method, images, *values, f"{each.seconds:.2f}")
    return table


def _table_of_paper(evaluation: Evaluation, protocol: Protocol, paper: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{protocol.table} of arXiv 2505.18679: {protocol.title} ({' '.join(protocol.metrics)})",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    table.add_column("method")
    for column in protocol.columns:
        table.add_column(column.name, justify="right")
    if protocol.average:
        table.add_column("average", justify="right")
    group = None
    for row in protocol.rows if paper else ():
        if row.group != group:
            group = row.group
            table.add_section()
        name = " ".join(filter(None, (row.method, row.params)))
        table.add_row(name, *(_cell(values, protocol.metrics) for values in row.values), style="dim")
    table.add_section()
    for method in evaluation.methods:
        found = [_of_column(evaluation.averages, method, column) for column in protocol.columns]
        cells = [None if each is None else [each.values.get(name) for name in protocol.metrics] for each in found]
        if protocol.average:
            cells.append(_mean(cells))
        table.add_row(f"{method}, here", *("" if cell is None else _cell(cell, protocol.metrics) for cell in cells))
    return table


def _of_column(averages: Sequence[Average], method: str, column: Column) -> Average | None:
    return next((each for each in averages if each.method == method and each.sigma == column.sigma
                 and column.is_of(each.set)), None)  # fmt: skip


def _mean(cells: Sequence[list[float | None] | None]) -> list[float | None] | None:
    """The mean of columns, metric by metric, where all are there."""
    if any(cell is None or None in cell for cell in cells):
        return None
    return [sum(values) / len(values) for values in zip(*cells, strict=True)]  # type: ignore[arg-type, misc]


def _cell(values: Sequence[float | None], metrics: Sequence[str]) -> str:
    """As tables print it: ``31.40 .892``."""
    texts = []
    for value, name in zip(values, metrics, strict=True):
        text = "-" if value is None else f"{value:.2f}" if METRICS[name].unit else f"{value:.3f}"
        texts.append(text[1:] if text.startswith("0.") else text)
    return " ".join(texts)


def _definitions(evaluation: Evaluation) -> list[str]:
    lines = [f"{name}: {text}" for name, text in (*evaluation.metrics.items(), *evaluation.methods.items())]
    settings = evaluation.settings
    crop = f"multiples of {settings['crop']} around their centre" if settings["crop"] > 1 else "nothing"
    if any(each.sigma is not None for each in evaluation.averages):
        lines.append(f"noise: {settings['noise']}; seed {settings['seed']}, {settings['generator']}")
    if any(each.kind is not None for each in evaluation.averages):
        lines.append(f"kinds: mirage.degradations with its own ranges; seed {settings['seed']}, per kind and image")
    return [*lines, f"images: cut to {crop}" if settings["crop"] > 1 else "images: whole"]


def _not_the_papers(evaluation: Evaluation, protocol: Protocol) -> list[str]:
    """What keeps a column here from being the paper's."""
    notes = []
    for column in protocol.columns:
        found = [each for each in evaluation.averages if each.sigma == column.sigma and column.is_of(each.set)]
        images = sorted({each.images for each in found} - {column.images})
        if column.images is not None and images:
            counts = " or ".join([*map(str, images[:-1]), counted(images[-1], "image")])
            notes.append(f"{column.name}: {counts}, the paper's has {column.images}")
    return notes


def _what(of: Average | Failure) -> str:
    """What the images of a set got."""
    return ("" if of.sigma is None else f" sigma {of.sigma:g}") + ("" if of.kind is None else f" {of.kind}")


def write_csv(evaluation: Evaluation, path: str | Path) -> None:
    """Write a line for each image, method and set, and one for each average (``image`` is then ``average``)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["method", "set", "sigma", "image", "height", "width", *evaluation.metrics, "seconds", "kind"])
    for row in evaluation.rows:
        values = [row.values[name] for name in evaluation.metrics]
        place = [row.method, row.set, _plain(row.sigma), row.image, row.height, row.width]
        writer.writerow([*place, *values, row.seconds, row.kind or ""])
    for each in evaluation.averages:
        values = [each.values[name] for name in evaluation.metrics]
        writer.writerow([each.method, each.set, _plain(each.sigma), "average", "", "", *values, each.seconds,
                             each.kind or ""])  # fmt: skip
    write_whole(path, text.getvalue().encode("utf-8"))


def _plain(sigma: float | None) -> str:
    return "" if sigma is None else f"{sigma:g}"
