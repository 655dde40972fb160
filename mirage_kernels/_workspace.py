"""Scratch memory that the C++ kernels keep between calls."""

from __future__ import annotations

from mirage_kernels import _dispatch


def release_workspace() -> int:
    """Give the scratch memory that the C++ kernels keep between calls back to the system.

    They keep at most 64 MiB for the whole process, whatever it computes: buffers that are taken again by the next call
    rather than mapped, cleared and unmapped by the operating system each time.

    Returns:
        How many bytes were kept; 0 where the C++ library is not there.
    """
    return _dispatch.native.release_workspace() if _dispatch.native is not None else 0
