"""Feature maps that need not fit in memory: the first rows in memory, as far as a budget goes, the others in a file.

Files are read and written, not mapped: a disk that is full then is an error, where a mapping would end the process.
They have no name, so they are gone whenever the process is, however it ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage.memory import format_bytes

__all__ = ["FeatureMap", "Storage"]

IO_THREADS = 2  # copies between the system's cache and buffers: one thread does not use all that memory can do
LARGEST_CALL = 1 << 30  # Linux reads and writes at most 2 GiB at once


class Storage:
    """Feature maps of one run.

    Args:
        folder: where files go; None for the system's folder for temporary files.
        memory: bytes that maps may take of memory; what does not fit goes to files.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, memory: int) -> None:
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.memory = memory
        self._io = ThreadPoolExecutor(IO_THREADS, "mirage-scratch")
        self._maps: weakref.WeakSet[FeatureMap] = weakref.WeakSet()

    def close(self) -> None:
        """Give up all maps, whoever still knows them: the traceback of an exception does."""
        self._io.shutdown()
        for map in list(self._maps):
            map.close()

    def check_space(self, needed: int) -> None:
        """Raise OSError where the folder's disk has fewer than `needed` bytes free."""
        if not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "scratch: expected a folder", str(self.folder))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise _no_space(self.folder, needed, free)

    def map(self, channels: int, height: int, width: int, dtype: torch.dtype, reserve: int = 0) -> FeatureMap:
        """A new map whose content is undefined. `reserve`: bytes of memory to leave to maps that come later."""
        row = channels * width * dtype.itemsize
        rows = max(0, min(height, (self.memory - reserve) // row))
        self.memory -= rows * row
        found = FeatureMap(self, (channels, height, width), dtype, rows)
        weakref.finalize(found, self._give_back, rows * row)
        self._maps.add(found)
        return found

    def _give_back(self, count: int) -> None:
        self.memory += count

    def each(self, function: Callable[[int], None], count: int) -> None:
        """Calls function(i) for i below count on a few threads; the first exception is raised."""
        for _ in self._io.map(function, range(count)):
            pass


class FeatureMap:
    """A map [channels, height, width] that is read and written by strips of whole rows. See :meth:`Storage.map`."""

    def __init__(self, storage: Storage, shape: tuple[int, int, int], dtype: torch.dtype, rows: int) -> None:
        self.shape, self.dtype = shape, dtype
        self._storage, self._rows = storage, rows
        channels, height, width = shape
        self._row = width * dtype.itemsize
        self._head = torch.empty(channels, rows, width, dtype=dtype)
        self._file: Any = None
        if rows < height:
            self._file = tempfile.TemporaryFile(dir=storage.folder, buffering=0)
            _reserve(self._file.fileno(), channels * (height - rows) * self._row, storage.folder)

    def close(self) -> None:
        """Free memory and disk."""
        self._head = torch.empty(0)
        if self._file is not None:
            self._file.close()

    def read(self, first: int, into: Tensor) -> None:
        """Rows from `first` on into a tensor [channels, rows, width] with whole rows."""
        self._move(first, into, reading=True)

    def write(self, first: int, values: Tensor) -> None:
        """The reverse of :meth:`read`."""
        self._move(first, values, reading=False)

    def _move(self, first: int, values: Tensor, reading: bool) -> None:
        if values.device.type != "cpu":
            staging = torch.empty(values.shape, dtype=values.dtype) if reading else values.cpu()
            self._move(first, staging, reading)
            if reading:
                values.copy_(staging)
            return
        in_memory = max(0, min(self._rows - first, values.shape[1]))
        if in_memory:
            kept, given = self._head[:, first : first + in_memory], values[:, :in_memory]
            given.copy_(kept) if reading else kept.copy_(given)
        if in_memory < values.shape[1]:
            self._move_file(first + in_memory - self._rows, values[:, in_memory:], reading)

    def _move_file(self, first: int, values: Tensor, reading: bool) -> None:
        lines, fd = values.view(torch.uint8).numpy(), self._file.fileno()
        height = self.shape[1] - self._rows

        def channel(i: int) -> None:
            lines_of, at = memoryview(lines[i]).cast("B"), (i * height + first) * self._row
            _transfer(fd, lines_of, at, reading)
            if reading:
                _read_ahead(fd, at + len(lines_of), min(values.shape[1], height - first - values.shape[1]) * self._row)

        self._storage.each(channel, self.shape[0])


def _transfer(fd: int, buffer: memoryview, offset: int, reading: bool) -> None:
    while len(buffer):
        part = buffer[:LARGEST_CALL]
        count = os.preadv(fd, [part], offset) if reading else os.pwrite(fd, part, offset)
        if count <= 0:
            raise OSError(errno.EIO, "the scratch file ends before its map does")
        buffer, offset = buffer[count:], offset + count


def _read_ahead(fd: int, offset: int, size: int) -> None:
    """Starts to read the next strip from the disk, where it is not in the system's cache: channels lie too far apart in
    a file for the system to see what comes next."""
    if size > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)


def _reserve(fd: int, size: int, folder: Path) -> None:
    """Takes the disk's blocks now, so that a disk that fills up meanwhile is no concern of a run under way."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(folder, size, shutil.disk_usage(folder).free) from error
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def _no_space(folder: Path, needed: int, free: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"scratch: feature maps need {needed} bytes ({format_bytes(needed)}), {free} ({format_bytes(free)}) are "
        "available; choose another folder, or allow more memory",
        str(folder),
    )
