"""Which files of a folder are photographs to restore, and which others look like some.

A photograph is a file whose name ends as those of a format that is read (`mirage.images.SUFFIXES`) and which begins as
any of them does. What has such a name and begins otherwise is taken too, to be reported as broken, unless it is what
another system keeps beside a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mirage.images import BEGINNING, SIDECAR, SUFFIXES, begins_as_image

__all__ = ["photographs_in"]

_OTHERS = """
.apng .arw .bmp .cr2 .cr3 .dng .exr .gif .hdr .ico .j2k .jp2 .jpf .jxl .jxr .nef .orf .pbm .pef
.pgm .pnm .ppm .psd .qoi .raf .raw .rw2 .sr2 .srw .svg .tga .xcf
"""
OTHER_PICTURES = frozenset(_OTHERS.split())
"""Suffixes of pictures in formats that are not read."""


def photographs_in(folder: Path, skip: Callable[[Path, str], None]) -> list[Path]:
    """The photographs in a folder and the folders below it, in order; links to folders are not followed.

    Args:
        skip: called with each file that is none though it looks like one, and why.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        reason = _why_not(path)
        if reason is None:
            found.append(path)
        elif reason:
            skip(path, reason)
    return found


def _why_not(path: Path) -> str | None:
    """None for a photograph; why it is none; ``""`` where nobody would think that it is one."""
    suffix = path.suffix.lower()
    if path.is_symlink() and not path.exists():
        return "a link to nothing" if suffix in SUFFIXES or suffix in OTHER_PICTURES else ""
    if path.is_symlink() and path.is_dir():
        return "a link to a folder"
    if not path.is_file():
        return ""
    if suffix in OTHER_PICTURES:
        return "a format that is not read"
    if suffix and suffix not in SUFFIXES:
        return ""
    beginning = _beginning(path)
    is_image = begins_as_image(beginning)
    if not suffix:
        return "an image without the suffix of one" if is_image else ""
    if not is_image and (path.name.startswith("._") or beginning.startswith(SIDECAR)):
        return "an AppleDouble sidecar"
    return None


def _beginning(path: Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(BEGINNING)
    except OSError:  # reported when the file is to be restored
        return b""


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, links followed."""
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
