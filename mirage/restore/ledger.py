"""Records of restored files: lines of JSON, one as each file is done, and a table of them all at the end.

The first line says what the results are of, so that a folder with results of something else is not gone on with.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirage.restore.files import Job, is_finished
from mirage.whole_files import write_whole

__all__ = ["Ledger"]


class Ledger:
    """The records of a folder, by target.

    Args:
        path: of the lines, ``.jsonl``; the table lies beside it as ``.csv``.
        format: what the file calls itself.
        of: the name under which the first line has the fingerprint, such as ``"groups"``.
        fingerprint: of what restores.
        columns: of the table.
        overwrite: begin anew where the records are of something else.
        what: what results of another fingerprint are, in the error.

    Raises:
        ValueError: the records are of something else, and ``overwrite`` is not set; or the file is none of records.
    """

    def __init__(
        self, path: Path, *, format: str, of: str, fingerprint: str, columns: Sequence[str], overwrite: bool, what: str
    ) -> None:
        self.path, self.columns = path, columns
        self.head = {"format": format, of: fingerprint}
        self.records: dict[str, dict[str, Any]] = {}
        lines = self._lines()
        if lines and lines[0] == self.head:
            self.records = {record["target"]: record for record in lines[1:]}
        elif lines and not overwrite:
            raise ValueError(f"{path}: has results of {what}; name another folder, or overwrite them")
        self._begin(len(lines) > len(self.records) + 1 or not self.records)

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines of the file; one that was being written when a process ended is left out."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        try:
            lines = [json.loads(line) for line in text.split("\n")[:-1] if line]
            if not all(isinstance(line, dict) for line in lines) or any("target" not in line for line in lines[1:]):
                raise ValueError("expected an object with a target in each line")
        except ValueError as error:
            raise ValueError(f"{self.path}: not readable as records of results: {error}") from error
        return lines

    def _begin(self, anew: bool) -> None:
        """Write the file again without what does not count, and without a half line."""
        if not anew and self.path.exists() and self.path.read_bytes().endswith(b"\n"):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in (self.head, *self.records.values()))
        write_whole(self.path, text.encode("utf-8"))

    def find(self, job: Job) -> dict[str, Any] | None:
        """The record of a finished job."""
        record = self.records.get(str(job.target))
        return None if record is None or not is_finished(job) else record

    def add(self, record: dict[str, Any]) -> None:
        """Add a line, at once; a record has ``target``."""
        if self.records.get(record["target"]) == record:
            return
        self.records[record["target"]] = record
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_table(self) -> None:
        """Write all records as CSV; lists are JSON there."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for target in sorted(self.records):
            record = self.records[target]
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in record.items()})
        write_whole(self.path.with_suffix(".csv"), text.getvalue().encode("utf-8"))
