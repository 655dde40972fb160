"""Restore a million files on many machines, over Ray Data: ``mirage restore ... --engine ray``.

Inputs and outputs are wherever fsspec reads and writes (local, ``s3://``, ``gs://``, ...). One worker a GPU, or a few
CPUs, holds the network; a manifest in Parquet says what became of each file, and the next run goes on from it. A worker
that is killed loses nothing: its files are begun again, and a file that kills its workers is given up after three.

Needs the extras ``images`` and ``ray``, and the library of the store: ``s3fs``, ``gcsfs``, ``adlfs``, ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirage.lazy import lazily

if TYPE_CHECKING:
    from mirage.distributed.job import Summary, restore
    from mirage.distributed.manifest import Record, read_manifest

__all__ = ["Record", "Summary", "read_manifest", "restore"]

_PLACES = {"Record": "manifest", "Summary": "job", "read_manifest": "manifest", "restore": "job"}


# The command line imports this package for its options alone.
__getattr__, __dir__ = lazily(__name__, _PLACES)
