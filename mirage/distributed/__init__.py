"""Restore a million files on many machines, over Ray Data: ``mirage restore ... --engine ray``.

Inputs and outputs are wherever fsspec reads and writes (local, ``s3://``, ``gs://``, ...). One worker a GPU, or a few
CPUs, holds the network; a manifest in Parquet says what became of each file, and the next run goes on from it. A worker
that is killed loses nothing: its files are begun again, and a file that kills its workers is given up after three.

Needs the extras ``images`` and ``ray``, and the library of the store: ``s3fs``, ``gcsfs``, ``adlfs``, ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirage.distributed.job import Summary, restore
    from mirage.distributed.manifest import Record, read_manifest

__all__ = ["Record", "Summary", "read_manifest", "restore"]

_PLACES = {"Record": "manifest", "Summary": "job", "read_manifest": "manifest", "restore": "job"}


def __getattr__(name: str) -> Any:
    """Import a name's module on first use: the command line imports this package for its options alone."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
