"""Tensors by their names, in memory or in a ``.safetensors`` file, which is mapped only while it is read."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
        path = self.checked()
        try:
            layout = self._layout
            storage: Any = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=layout.bytes)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        yield layout.tensors(storage)

    @cached_property
    def _layout(self) -> _Layout:
        """Where tensors lie in the file, which safetensors has found to be whole."""
        import safetensors

        path = self.checked()
        try:
            with safetensors.safe_open(path, framework="pt"):
                return _Layout.read(path)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error

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


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors by their names in a safetensors file."""


class _Piece(NamedTuple):
    """A tensor in a file: where it begins after the header, in elements of its type."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Layout:
    """The places of all tensors of a safetensors file.

    The library makes a tensor in 18 microseconds. An expert of MIRAGE-T and its base have 1,900, and are read whenever
    it comes into memory, so places are looked up once here, and tensors made of the mapped file in a tenth of that.

    Attributes:
        bytes: of the file.
        header: bytes before the first tensor, a multiple of 8.
        pieces: the tensors; experts that have the same share one tuple.
    """

    bytes: int
    header: int
    pieces: tuple[_Piece, ...]

    @classmethod
    def read(cls, path: Path) -> _Layout:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        if length % 8:
            raise ValueError(f"its header has {length} bytes, which is no multiple of 8")
        return cls(path.stat().st_size, 8 + length, _pieces(json.dumps(entries)))

    def tensors(self, storage: torch.UntypedStorage) -> dict[str, Tensor]:
        """Views of a mapped file."""
        whole = {dtype: torch.empty(0, dtype=dtype) for dtype in {piece.dtype for piece in self.pieces}}
        for tensor in whole.values():
            tensor.set_(storage)  # type: ignore[call-overload]
        first = {dtype: self.header // dtype.itemsize for dtype in whole}
        return {p.name: whole[p.dtype].as_strided(p.shape, p.strides, first[p.dtype] + p.start) for p in self.pieces}


@lru_cache(maxsize=8)
def _pieces(entries: str) -> tuple[_Piece, ...]:
    """Of a header without what it says beside the tensors, which experts of one base have in common."""
    pieces = []
    for name, entry in json.loads(entries).items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of the type {entry['dtype']}, which no network here has")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, rest = divmod(entry["data_offsets"][0], dtype.itemsize)
        if rest:
            raise ValueError(f"{name} does not begin at a multiple of its type's size")
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        pieces.append(_Piece(name, dtype, shape, strides, start))
    return tuple(pieces)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
