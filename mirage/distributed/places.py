"""Folders and files wherever fsspec reads and writes: local, ``s3://``, ``gs://``, ``az://``, ``sftp://``, ...

Files are written whole or not at all. Object stores show an object when its upload is complete; elsewhere the bytes go
to a temporary name in the same folder, which is then renamed.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from mirage.whole_files import temporary_name, write_whole

__all__ = ["Entry", "Place", "digest", "retrying"]

T = TypeVar("T")

SINGLE_PUT = frozenset(
    ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "ocilake", "oss", "r2", "b2", "hf", "memory")
)
"""Protocols of stores in which an object appears, complete, when its upload ends."""

VERSIONS = ("ETag", "etag", "content_hash", "mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems call that which changes with a file, the surest first."""

DEFINITE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, MemoryError)
"""Errors that another try would meet again."""


@dataclass(frozen=True)
class Entry:
    """One file of a listing.

    Attributes:
        path: as its file system names it.
        place: relative to what was listed, with ``/``.
        size: bytes, or -1 where the file system does not say.
        version: what changes when the content does: the store's etag, else the time of the last change; "" if unknown.
    """

    path: str
    place: str
    size: int
    version: str


@dataclass(frozen=True)
class Place:
    """A folder, file or pattern that an fsspec URL or a local path names.

    Args:
        url: what the user wrote.
        options: arguments of the file system (credentials, endpoints), by protocol: ``{"s3": {"anon": True}}``.
    """

    url: str
    options: Mapping[str, Mapping[str, Any]]

    def __post_init__(self):
        if not self.url:
            raise ValueError("expected a path or a URL, got an empty string")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        protocol = self.url.split("::")[0].split("://")[0] if "://" in self.url else "file"
        url = self.url if "://" in self.url or "::" in self.url else os.path.abspath(os.path.expanduser(self.url))
        options = dict(self.options.get(protocol, {}))
        if self.protocol_is_remote(protocol):
            options.setdefault("use_listings_cache", False)  # listed once, and other processes write there
        try:
            return url_to_fs(url, **options)
        except ImportError as error:
            raise ValueError(f"{self.url}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.url}: not a path or URL that fsspec knows: {error}") from error

    @staticmethod
    def protocol_is_remote(protocol: str) -> bool:
        """Whether this is neither the local disk nor this process's memory."""
        return protocol not in ("file", "local", "memory")

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """The path inside the file system, without a slash at its end; of local ones with links followed."""
        path = self._opened[1]
        return os.path.realpath(path) if self.is_local else path.rstrip("/") or path

    @property
    def protocols(self) -> tuple[str, ...]:
        """Names of the file system's protocol, such as ``("file", "local")``."""
        names = self.fs.protocol
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def is_local(self) -> bool:
        """Whether its files are on this machine's disks, under ordinary paths."""
        return "file" in self.protocols

    def name(self, path: str) -> str:
        """The URL of a file of this file system: what the manifest calls it."""
        chain = self.url.split("::", 1)
        return self.fs.unstrip_protocol(path) + (f"::{chain[1]}" if len(chain) == 2 else "")

    def below(self, place: str) -> str:
        """The path of ``place`` in this folder."""
        return posixpath.join(self.root, place)

    # --- listing

    def entries(self) -> Iterator[Entry]:
        """All files: of a folder, at any depth; of a pattern (``*``, ``?``, ``[``); or the one file.

        Local folders are read entry by entry. Of others, one folder's listing at a time is held.

        Raises:
            FileNotFoundError: there is nothing of that name.
        """
        root = self.root
        if any(mark in root for mark in "*?[") and not self.fs.exists(root):
            yield from self._matching(root)
            return
        info = self.fs.info(root)
        if info["type"] == "directory":
            yield from self._walk_local(root) if self.is_local else self._walk(root)
        else:
            yield self._entry(root, posixpath.basename(root), info)

    def _matching(self, pattern: str) -> Iterator[Entry]:
        fixed = posixpath.dirname(pattern[: min(pattern.index(mark) for mark in "*?[" if mark in pattern)])
        found = self.fs.glob(pattern, detail=True)
        for path, info in found.items():
            if info["type"] == "file":
                yield self._entry(path, posixpath.relpath(path, fixed or "."), info)
        if not found:
            raise FileNotFoundError(f"no file matches {self.url!r}")

    def _walk(self, root: str) -> Iterator[Entry]:
        for _, _, files in self.fs.walk(root, detail=True, on_error="raise"):
            for name in sorted(files):
                path = files[name]["name"]
                if name:  # stores keep an empty object in the name of a folder
                    yield self._entry(path, path[len(root) :].lstrip("/"), files[name])

    def _walk_local(self, folder: str, above: str = "") -> Iterator[Entry]:
        """Without fsspec, which holds the listing of a folder, a kilobyte a file."""
        inner = []
        with os.scandir(folder) as found:
            for item in found:
                place = f"{above}{item.name}"
                if item.is_dir(follow_symlinks=False):
                    inner.append((item.path, f"{place}/"))
                elif item.is_file():
                    stat = item.stat()
                    yield Entry(item.path, place, stat.st_size, repr(stat.st_mtime_ns))
        for path, place in sorted(inner):
            yield from self._walk_local(path, place)

    def _entry(self, path: str, place: str, info: Mapping[str, Any]) -> Entry:
        if self.is_local:
            stat = os.stat(path)
            return Entry(path, place, stat.st_size, repr(stat.st_mtime_ns))
        size = info.get("size")
        return Entry(path, place, -1 if size is None else int(size), _version(info))

    # --- reading and writing

    def read(self, path: str) -> bytes:
        """The content of a file."""
        return self.fs.cat_file(path)

    def write(self, path: str, data: bytes, tag: str = "0") -> None:
        """Write a file, whole or not at all, over an earlier one.

        Args:
            tag: part of the temporary name where one is needed; writers at the same time have different ones.
        """
        if self._is_single_put:
            self.fs.pipe_file(path, data)
            return
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if self.is_local:
            write_whole(path, data, tag=tag)
            return
        temporary = self.temporary(path, tag)
        try:
            self.fs.pipe_file(temporary, data)
            self.fs.mv(temporary, path)
        except BaseException:
            self.remove(temporary)
            raise

    @property
    def _is_single_put(self) -> bool:
        return any(name in SINGLE_PUT for name in self.protocols)

    def temporary(self, path: str, tag: str) -> str:
        """The name under which the bytes of ``path`` are collected: beside it, where it is no link to elsewhere."""
        folder, name = posixpath.split(os.path.realpath(path) if self.is_local else path)
        return posixpath.join(folder, temporary_name(name, tag))

    def remove_temporary(self, path: str, tag: str) -> None:
        """Remove what a writer of ``path`` that was killed has left."""
        if not self._is_single_put:
            self.remove(self.temporary(path, tag))

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        try:
            self.fs.rm_file(path)
        except FileNotFoundError:
            pass


def _version(info: Mapping[str, Any]) -> str:
    for key in VERSIONS:
        value = info.get(key)
        if value:
            return value.isoformat() if hasattr(value, "isoformat") else str(value)
    return ""


def digest(*parts: object) -> bytes:
    """16 bytes that stand for these values; a million of them take less memory than a million URLs."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=16).digest()


def retrying(do: Callable[[], T], retries: int, wait: float = 0.5) -> T:
    """``do()``, up to ``retries`` times again after errors that may pass, waiting twice as long each time."""
    for attempt in range(retries + 1):
        try:
            return do()
        except DEFINITE:
            raise
        except Exception:  # file systems raise what their client libraries do
            if attempt == retries:
                raise
            time.sleep(wait * 2**attempt * random.uniform(0.5, 1.5))
    raise ValueError(f"retries: expected 0 or more, got {retries}")
