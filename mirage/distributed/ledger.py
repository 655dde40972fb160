"""Which files are being worked on: what a worker that was killed would take with it.

A Ray actor on the driver's machine. Workers tell it when they begin a file and when it is done, one call each; the
driver fetches the records of finished files from it. A batch that is tried again, after its worker was killed, goes on
where it was, and a file that kills its worker each time is told from those that were beside it.
"""

from __future__ import annotations

from mirage.distributed.manifest import Record

__all__ = ["Ledger"]


class Ledger:
    """Counts of beginnings, and records of ends, by the number of a file in the list of tasks."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}
        self._done: set[int] = set()
        self._records: list[Record] = []

    def look(self, indices: list[int]) -> tuple[list[int], dict[int, int]]:
        """Of these files: those that are done, and of the others how often each was begun (if it was)."""
        done = [index for index in indices if index in self._done]
        return done, {index: self._begun[index] for index in indices if index in self._begun}

    def begin(self, index: int) -> int:
        """A file is begun; how often it was before, without an end."""
        before = self._begun.get(index, 0)
        self._begun[index] = before + 1
        return before

    def end(self, index: int, record: Record) -> None:
        """A file is done. Of two workers that did the same file, one that was taken for dead, the first counts."""
        self._begun.pop(index, None)
        if index not in self._done:
            self._done.add(index)
            self._records.append(record)

    def fetch(self) -> list[Record]:
        """The records since the last call."""
        records, self._records = self._records, []
        return records
