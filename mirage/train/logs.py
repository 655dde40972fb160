"""What training tells: CSV files that outlive interruptions, the terminal, and TensorBoard where it is wanted."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from mirage.train.config import ConfigError
from mirage.whole_files import write_whole

__all__ = ["Logs"]


class Logs:
    """Rows of numbers by kind (``train``, ``validation``), one CSV file each.

    Args:
        folder: of the run.
        step: the step that training begins or goes on at; later rows of an interrupted run are removed.
        tensorboard: also write events for TensorBoard to ``folder/tensorboard``.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.csv"):
            _cut(path, step)
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("output.tensorboard: needs the package tensorboard, of the extra [train]") from error
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> str:
        """Add a row, and return it as a line for the terminal."""
        row = {"step": step, **{name: _short(value) for name, value in values.items()}}
        path = self.folder / f"{kind}.csv"
        if path.exists() and _columns(path) != list(row):  # other sets, or an average that was not there before
            number = next(i for i in range(1, 10**6) if not path.with_suffix(f".{i}.csv").exists())
            path.rename(path.with_suffix(f".{number}.csv"))
        fresh = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()
        return f"{kind:10s} " + "  ".join(f"{name} {value}" for name, value in row.items())


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _columns(path: Path) -> list[str]:
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _cut(path: Path, step: int) -> None:
    """Remove the rows after ``step``."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0][:1] != ["step"]:
        return
    kept = [row for i, row in enumerate(rows) if i == 0 or (row and row[0].isdigit() and int(row[0]) <= step)]
    if len(kept) < len(rows):
        text = io.StringIO(newline="")
        csv.writer(text).writerows(kept)
        write_whole(path, text.getvalue().encode("utf-8"))
