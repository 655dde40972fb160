"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, data: bytes, *, prefix: str, suffix: str = "") -> None:
    """Write ``data`` to a temporary file beside ``path``, on the disk, and give it the name then; what had the name
    stays until then. The temporary name begins with ``prefix`` and ends with ``suffix``, and is gone after an error.

    Raises:
        OSError: the file cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a name never stands for less than the whole, after a power cut either
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
