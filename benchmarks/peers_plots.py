"""Plots of the CPU peers, made of the rows of a benchmark run: time, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import NAMES, Row

OURS, THEIRS = "#3b6ea5", "#b8bcc4"
TITLES = {"inference": "inference", "forward": "forward with autograd", "step": "training step"}


def _figure(rows: int, columns: int, height: float) -> tuple[Any, Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.6 * columns, height * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return pyplot, figure, list(panels.flat)


def _bars(panel: Any, rows: list[Row], key: str, digits: int) -> None:
    """One bar per row, the first on top, with its value at its end."""
    labels = [row["label"] for row in rows]
    values = [row[key] for row in rows]
    panel.barh(labels, values, color=[OURS if row["peer"].startswith("fast") else THEIRS for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.18)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    for label, value in zip(labels, values, strict=True):
        panel.text(value, label, f" {value:.{digits}f}", va="center", fontsize=8)


def _grouped(rows: list[Row], tests: tuple[str, ...]) -> list[tuple[str, list[Row]]]:
    """Title and rows of each panel: one per mode, size and variant, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["test"] in tests:
            size = "x".join(map(str, row["shape"]))
            found.setdefault(f"{NAMES[row['variant']]}, {TITLES[row['mode']]}, {size}", []).append(row)
    return list(found.items())


def _plot(groups: list[tuple[str, list[Row]]], path: Path, key: str, unit: str, digits: int) -> Path | None:
    if not groups:
        return None
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    tallest = max(len(rows) for _, rows in groups)
    pyplot, figure, panels = _figure(lines, columns, 0.9 + 0.26 * tallest)
    for panel, (title, rows) in zip(panels, groups, strict=False):
        _bars(panel, rows, key, digits)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(unit, fontsize=8)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def plot_times(rows: list[Row], path: Path) -> Path | None:
    """Median seconds of inference and of a training step, one panel per problem; None without rows."""
    return _plot(_grouped(rows, ("test_inference", "test_step")), path, "median", "seconds", digits=3)


def plot_memory(rows: list[Row], path: Path) -> Path | None:
    """Resident memory that a pass adds, one panel per problem; None without rows."""
    return _plot(_grouped(rows, ("test_memory",)), path, "rss_mib", "MiB", digits=0)
