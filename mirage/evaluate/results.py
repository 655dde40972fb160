"""Results of an evaluation, per image, in a JSON file that an interrupted evaluation goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirage.whole_files import write_whole

__all__ = ["Failure", "Key", "Results", "Row", "SettingsDiffer"]

FORMAT = "mirage evaluation, version 1"
SECONDS_BETWEEN_WRITES = 10.0

Key = tuple[str, str, float | None, str | None, str]
"""Method, set, sigma, kind, image."""


class SettingsDiffer(ValueError):
    """The file holds results of another evaluation."""


@dataclass(frozen=True)
class Row:
    """One image restored by one method.

    Attributes:
        method, set, sigma, kind, image: what; ``sigma`` in units of 1/255, None where no noise was added; ``kind`` of
            the degradation in its place, or None.
        height, width: in pixels, as evaluated.
        values: the metrics by name.
        seconds: that the method took.
        stamp: of the files it was computed from (sizes and times of change), and of the degradation's ranges: others
            are computed again.
    """

    method: str
    set: str
    sigma: float | None
    image: str
    height: int
    width: int
    values: Mapping[str, float]
    seconds: float
    stamp: str
    kind: str | None = None

    @property
    def key(self) -> Key:
        return self.method, self.set, self.sigma, self.kind, self.image


@dataclass(frozen=True)
class Failure:
    """One image that could not be evaluated, and why."""

    method: str
    set: str
    sigma: float | None
    image: str
    error: str
    kind: str | None = None


class Results:
    """Rows by key, and the file they are kept in.

    Args:
        path: of the JSON file; None keeps them in memory alone.
        settings: what all rows were computed under; a file with others is refused.
        overwrite: begin anew whatever the file holds.

    Raises:
        SettingsDiffer: the file holds an evaluation under other settings, or something else.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(path) if path is not None else None
        self.settings = dict(settings)
        self.methods: dict[str, dict[str, Any]] = {}
        self.rows: dict[Key, Row] = {}
        self.more: dict[str, Any] = {}  # what a reader of the file wants besides, set before the last write
        self._written = time.monotonic()
        if self.path is not None and self.path.exists() and not overwrite:
            self._load(self.path)

    def _load(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise SettingsDiffer(f"{path} is no evaluation of this version; name another file, or overwrite it")
            for name, value in self.settings.items():
                found = content["settings"].get(name)
                if found != value:
                    raise SettingsDiffer(
                        f"{path} holds an evaluation with {name} {found!r}, this one has {value!r}; "
                        "name another file, or overwrite it"
                    )
            self.methods = dict(content["methods"])
            for each in content["images"]:
                row = Row(**{**each, "values": {name: float(value) for name, value in each["values"].items()}})
                self.rows[row.key] = row
        except SettingsDiffer:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsDiffer(f"{path} cannot be read: {error}; name another file, or overwrite it") from error

    def declare(self, label: str, definition: str, identity: Mapping[str, Any]) -> None:
        """Say what a method is.

        Raises:
            SettingsDiffer: the file holds rows of another one under this label.
        """
        known = self.methods.get(label)
        if known is not None and known["identity"] != json.loads(json.dumps(identity)):
            raise SettingsDiffer(
                f"{self.path} holds results of another {label} ({known['definition']}); "
                "name another file, or overwrite it"
            )
        self.methods[label] = {"definition": definition, "identity": dict(identity)}

    def find(self, key: Key, stamp: str, metrics: Iterable[str]) -> Row | None:
        """The row of ``key`` where it is of these files and has these metrics."""
        row = self.rows.get(key)
        return row if row is not None and row.stamp == stamp and set(metrics) <= set(row.values) else None

    def add(self, row: Row) -> None:
        """Keep a row; the file is written every ten seconds."""
        self.rows[row.key] = row
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self._written = time.monotonic()
        if self.path is None:
            return
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "methods": self.methods,
            **self.more,
            "images": [asdict(row) for row in self.rows.values()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_without_infinities(content), indent=1, allow_nan=False) + "\n"
        write_whole(self.path, text.encode("utf-8"))


def _without_infinities(value: Any) -> Any:
    """JSON has no infinity, which is the PSNR of equal images: ``"inf"`` in its place, which ``float`` reads."""
    if isinstance(value, dict):
        return {name: _without_infinities(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
