"""What became of each input, as Parquet: one folder, a part every half minute, so that a crash loses little.

`pandas.read_parquet(folder)` reads it as it is, a row for each time a file was dealt with; `read_manifest` keeps the
last row of each input. Each part carries the settings under which its files were restored.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from mirage.distributed.places import Entry, Place, digest

__all__ = ["FAILED", "PRESENT", "RESTORED", "History", "ManifestWriter", "Record", "new_run", "read_manifest"]

RESTORED, PRESENT, FAILED = "restored", "present", "failed"
SETTINGS = b"mirage"
PART = "part-"


@dataclass(frozen=True)
class Record:
    """One row of the manifest.

    Attributes:
        input, output: URLs.
        status: ``"restored"``, ``"present"`` (the output was there before, nothing was done) or ``"failed"``.
        seconds: reading, restoring and writing.
        error: why it failed, a sentence; None else.
        notes: what of the file's metadata could not be read or carried over.
        size, version: of the input as listed: bytes, and the store's etag or the time of its last change.
        width, height: in pixels, 0 where they are not known.
        worker: host and process that did it.
        finished: UTC.
    """

    input: str
    output: str
    status: str
    seconds: float = 0.0
    error: str | None = None
    notes: tuple[str, ...] = ()
    size: int = -1
    version: str = ""
    width: int = 0
    height: int = 0
    worker: str = ""
    finished: datetime | None = None


def new_run() -> str:
    """A name for a run; those of later runs sort after it."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(2)}"


def _schema(settings: Mapping[str, Any] | None = None) -> Any:
    import pyarrow as pa

    fields = [
        *(("input", pa.string()), ("output", pa.string()), ("status", pa.string()), ("seconds", pa.float64())),
        *(("error", pa.string()), ("notes", pa.list_(pa.string())), ("size", pa.int64()), ("version", pa.string())),
        *(("width", pa.int32()), ("height", pa.int32()), ("worker", pa.string())),
        ("finished", pa.timestamp("ms", tz="UTC")),
    ]
    return pa.schema(fields, {SETTINGS: json.dumps(settings, sort_keys=True)} if settings is not None else None)


class ManifestWriter:
    """Collects records and writes them as parts.

    Args:
        place: the manifest's folder.
        run: see `new_run`; part of the parts' names.
        settings: under which the files are restored.
        every: seconds, and ``rows``, after which a part is written.
    """

    def __init__(self, place: Place, run: str, settings: Mapping[str, Any], every: float = 30.0, rows: int = 10_000):
        self.place, self.run, self.every, self.rows = place, run, every, rows
        self._schema = _schema(settings)
        self._records: list[Record] = []
        self._parts = 0
        self._last = time.monotonic()

    def add(self, record: Record) -> None:
        """Take a record, and write a part if it is time."""
        self._records.append(record)
        self.tick()

    def tick(self) -> None:
        """Write a part if it is time."""
        if len(self._records) >= self.rows or time.monotonic() - self._last >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._records:
            table = pa.Table.from_pylist([asdict(record) for record in self._records], self._schema)
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            name = f"{PART}{self.run}-{self._parts:06}.parquet"
            self.place.write(self.place.below(name), buffer.getvalue(), self.run)
            self._parts += 1
            self._records.clear()
        self._last = time.monotonic()


def _parts(place: Place, columns: list[str] | None = None) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """The parts in the order in which they were written, and the settings of each; a few are read ahead."""
    import pyarrow.parquet as pq

    if not place.fs.exists(place.root):
        return
    paths = [path for path in place.fs.ls(place.root, detail=False) if posixpath.basename(path).startswith(PART)]

    def read(path: str) -> tuple[Any, dict[str, Any] | None]:
        try:
            table = pq.read_table(io.BytesIO(place.read(path)), columns=columns)
        except Exception as error:
            raise ValueError(f"manifest: cannot read {place.name(path)}: {error}") from error
        settings = (table.schema.metadata or {}).get(SETTINGS)
        return table, None if settings is None else json.loads(settings)

    with ThreadPoolExecutor(8) as pool:
        waiting: list[Any] = []
        for path in sorted(paths):
            waiting.append(pool.submit(read, path))
            if len(waiting) == 16:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def read_manifest(url: str | os.PathLike[str], storage_options: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """The manifest as a ``pyarrow.Table``: the last row of each input, with the columns of `Record`.

    Args:
        url: its folder, ``OUT/manifest.parquet`` unless another was asked for.
        storage_options: as for `mirage.distributed.restore`.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a part cannot be read.
    """
    import pyarrow as pa

    tables = [table for table, _ in _parts(Place(os.fspath(url), storage_options or {}))]
    if not tables:
        raise FileNotFoundError(f"no manifest at {os.fspath(url)!r}")
    table = pa.concat_tables([part.replace_schema_metadata(None) for part in tables])
    last = {name: row for row, name in enumerate(table["input"].to_pylist())}
    return table.take(pa.array(sorted(last.values()), pa.int64()))


class History:
    """Which inputs earlier runs have dealt with, in about 100 bytes each.

    Args:
        place: the manifest's folder, which need not exist.
        settings: of the present run; results of other settings are kept apart.
    """

    def __init__(self, place: Place, settings: Mapping[str, Any]):
        self._done: set[bytes] = set()
        self._failed: set[bytes] = set()
        self._known: set[bytes] = set()
        self._other: set[bytes] = set()
        self.differences: dict[str, tuple[Any, Any]] = {}
        """Settings of other runs whose results are still the last: name, then its value there and here."""
        others: list[dict[str, Any]] = []
        for table, made_with in _parts(place, ["input", "size", "version", "status"]):
            same = made_with is None or made_with == settings
            if not same and made_with is not None:
                others.append(made_with)
            self._read(table, same)
        if self._other:
            for made_with in others:
                for name in {*made_with, *settings}:
                    if made_with.get(name) != settings.get(name):
                        self.differences[name] = (made_with.get(name), settings.get(name))

    def _read(self, table: Any, same: bool) -> None:
        for row in zip(*(column.to_pylist() for column in table.itercolumns()), strict=True):
            name, size, version, status = row
            key, known = digest(name, size, version), digest(name)
            for group in (self._done, self._failed, self._other):
                group.discard(key)
            self._known.add(known)
            if status == FAILED:
                self._failed.add(key)
            else:
                (self._done if same else self._other).add(key)

    @property
    def with_other_settings(self) -> int:
        """How many inputs were last restored under other settings."""
        return len(self._other)

    def is_done(self, name: str, entry: Entry) -> bool:
        """Whether the input was restored, and has not changed since."""
        return digest(name, entry.size, entry.version) in self._done

    def is_failed(self, name: str, entry: Entry) -> bool:
        """Whether it failed, and has not changed since."""
        return digest(name, entry.size, entry.version) in self._failed

    def is_known(self, name: str) -> bool:
        """Whether an input of that name was dealt with, this version or another."""
        return digest(name) in self._known
