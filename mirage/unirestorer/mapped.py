"""Tensors by their names, in memory or in a ``.safetensors`` file, which is mapped only while it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mirage.checkpoint import CheckpointError

__all__ = ["Weights"]


@dataclass(frozen=True)
class Weights:
    """A mapping of names to tensors that may lie in a file.

    Attributes:
        tensors: those in memory; None of a file.
        path: the file.
        stamp: what told it from others when it was first seen.
    """

    tensors: Mapping[str, Tensor] | None
    path: Path | None = None
    stamp: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """Those in memory."""
        return cls(tensors)

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Weights:
        """Those of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file of weights at {os.fspath(path)!r}")
        return cls(None, path, _stamp(path))

    def checked(self) -> Path:
        """The file, which has to be the one that was there first.

        Raises:
            CheckpointError: it is gone, or another one.
        """
        assert self.path is not None
        try:
            same = _stamp(self.path) == self.stamp
        except FileNotFoundError:
            same = False
        if not same:
            raise CheckpointError(f"{self.path}: has changed or gone since it was first read; load the experts again")
        return self.path

    @contextmanager
    def opened(self) -> Iterator[Mapping[str, Tensor]]:
        """The tensors while the block runs; they must not be kept, and not be written to.

        Raises:
            CheckpointError: the file is damaged, gone, or another one.
        """
        if self.tensors is not None:
            yield self.tensors
            return
        import safetensors

        path = self.checked()
        try:
            file = safetensors.safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
        with file:
            yield _Mapped(file)

    def header(self, key: str) -> dict[str, Any] | None:
        """What a file says of itself under a key; None where it says nothing, or is of another kind.

        Raises:
            CheckpointError: the file is damaged, or it is no mapping.
        """
        if self.path is None or self.path.suffix != ".safetensors":
            return None
        import safetensors

        try:
            with safetensors.safe_open(self.checked(), framework="pt") as file:
                text = (file.metadata() or {}).get(key)
            found = None if text is None else json.loads(text)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: not a readable safetensors file: {error}") from error
        if found is not None and not isinstance(found, dict):
            raise CheckpointError(f"{self.path}: {key}: expected a mapping of settings, got {found!r}")
        return found


class _Mapped(Mapping[str, Tensor]):
    """Tensors of an open file, which share the mapping's memory."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, frozenset(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
