"""Files that appear under their name whole or not at all: the one way in which this package writes local files that
somebody may read, or go on from, after it was stopped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_temporary", "safetensors_bytes", "temporary_name", "write_whole"]

PREFIX, SUFFIX = ".mirage-", ".tmp"
METADATA = "__metadata__"  # of a .safetensors header

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What fsync says on file systems that have nothing to synchronise."""


def write_whole(path: str | os.PathLike[str], data: bytes, *, tag: str | None = None) -> None:
    """Write ``data`` to a temporary file beside ``path``, onto the disk, and give it the name then.

    What had the name stays until then, and keeps its permissions; a new file has those that the umask leaves. A
    symbolic link stays one: the file that it points to is replaced, on whichever file system that is. What is no
    regular file, such as ``/dev/stdout``, is written to. After an error the temporary file is gone.

    Args:
        tag: makes the temporary name known before (`temporary_name`), so that somebody else can remove what a process
            that was killed has left. None: a random one.

    Raises:
        OSError: the file cannot be written; the message names ``path``.
    """
    target = os.path.realpath(path)
    try:
        earlier = _mode(target)
        if earlier is not None and stat.S_ISDIR(earlier):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if earlier is not None and not stat.S_ISREG(earlier):
            with open(path, "wb") as file:
                file.write(data)
            return
        folder, name = os.path.split(target)
        temporary = os.path.join(folder, temporary_name(name, tag))
        _replace(target, data, temporary, None if earlier is None else stat.S_IMODE(earlier))
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # a temporary name tells nobody anything


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A ``.safetensors`` file of contiguous `tensors` with its metadata sorted. safetensors writes that in another
    order each time, and then equal weights have unequal checksums."""
    import safetensors.torch

    content = safetensors.torch.save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[METADATA] = dict(sorted(header[METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def _replace(target: str, data: bytes, temporary: str, mode: int | None) -> None:
    _remove(temporary)
    created = 0o666 if mode is None else mode & 0o777  # never open to more than the file that it replaces
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, created)) as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
            if mode is not None and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                _change_mode(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


def _sync(descriptor: int) -> None:
    """Onto the disk, so that a name never stands for less than the whole, after a power cut either."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def _change_mode(path: str, mode: int) -> None:
    try:
        os.chmod(path, mode)
    except PermissionError:
        pass  # a file system without permissions of its own, as FAT, or one that lets only the owner set some


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def temporary_name(name: str, tag: str | None = None) -> str:
    """The name under which the bytes of a file are collected, in the folder of that file; short, however long ``name``.

    Args:
        name: of the file, without its folder.
        tag: of the writer; those at the same time have different ones. None: a random one.
    """
    of_name = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return f"{PREFIX}{of_name}-{tag or secrets.token_hex(6)}{SUFFIX}"


def is_temporary(place: str) -> bool:
    """Whether a file is the temporary of a writer."""
    name = os.path.basename(place)
    return name.startswith(PREFIX) and name.endswith(SUFFIX)
