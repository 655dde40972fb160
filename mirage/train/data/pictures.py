"""Pictures in files and in WebDataset shards, read by their place, so that any sample can be the next one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

__all__ = ["Picture", "Reader", "files_in", "shard_samples"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Picture:
    """Where a picture lies.

    Attributes:
        path: of the file, or of the shard: local, or a URL that fsspec opens.
        name: what messages call it.
        offset, size: its bytes inside the shard; ``size`` None: the whole file.
    """

    path: str
    name: str
    offset: int = 0
    size: int | None = None


class Reader:
    """Decodes pictures to uint8 ``[H, W, 3]``, and keeps the first ``cache_bytes`` of them in memory."""

    def __init__(self, cache_bytes: int = 0) -> None:
        self.room = cache_bytes
        self._kept: dict[Picture, np.ndarray] = {}

    def __call__(self, picture: Picture) -> np.ndarray:
        """The picture, not to be written to.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        kept = self._kept.get(picture)
        if kept is not None:
            return kept
        pixels = self._decode(picture)
        if pixels.nbytes <= self.room:
            self.room -= pixels.nbytes
            self._kept[picture] = pixels
        return pixels

    def _decode(self, picture: Picture) -> np.ndarray:
        from PIL import Image

        try:
            with _open(picture.path) as file:
                file.seek(picture.offset)
                data = file.read(-1 if picture.size is None else picture.size)
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{picture.name}: not readable as a picture: {error}") from error


def files_in(folder: Path) -> list[Path]:
    """The pictures below a folder, sorted by their path.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not found:
        raise FileNotFoundError(f"no pictures in {str(folder)!r}")
    return found


def shard_samples(pattern: str) -> Iterator[tuple[str, dict[str, Picture]]]:
    """The samples of WebDataset shards: a key, and its pictures by their extension (``"clean.png"``).

    Files of a shard with one name up to the first dot are one sample. Headers alone are read; shards may be on any file
    system that fsspec opens.

    Args:
        pattern: paths with braces (``train-{000..031}.tar``) or wildcards.

    Raises:
        FileNotFoundError: no shard matches.
        ValueError: a shard is compressed or damaged, so that its members cannot be read one by one.
    """
    for path in _shards(pattern):
        samples: dict[str, dict[str, Picture]] = {}
        try:
            with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    place = PurePosixPath(member.name)
                    stem, dot, extension = place.name.partition(".")
                    if not member.isfile() or not stem or f".{extension.rpartition('.')[2].lower()}" not in SUFFIXES:
                        continue
                    picture = Picture(path, f"{path}:{member.name}", member.offset_data, member.size)
                    samples.setdefault(str(place.with_name(stem)), {})[extension.lower()] = picture
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not readable as an uncompressed tar file: {error}") from error
        yield from samples.items()


def _shards(pattern: str) -> list[str]:
    from braceexpand import braceexpand
    from fsspec.core import url_to_fs

    paths: list[str] = []
    for one in braceexpand(pattern):
        if not any(character in one for character in "*?["):
            paths.append(one)
            continue
        system, inner = url_to_fs(one)
        paths += [system.unstrip_protocol(found) if "://" in one else found for found in sorted(system.glob(inner))]
    missing = [path for path in paths if "://" not in path and not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"no shard at {missing[0] if missing else pattern!r}")
    return paths


def _open(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()
