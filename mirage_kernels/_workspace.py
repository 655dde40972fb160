"""Memory that the C++ kernels keep between calls."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels import _dispatch, _library


def release_workspace() -> int:
    """Give the memory that the C++ kernels keep between calls back to the system.

    It is scratch memory and the memory of large results that nothing refers to any more: taken again by the next call,
    rather than mapped, cleared and unmapped by the operating system each time. See :func:`limit_workspace`.

    Returns:
        How many bytes were kept; 0 where the C++ library is not there.
    """
    return _dispatch.native.release_workspace() if _dispatch.native is not None else 0


def limit_workspace(limit: int) -> int:
    """Set how much memory the C++ kernels keep between calls, 64 MiB for the whole process unless this says otherwise.

    With a limit as large as a few of its feature maps a network takes no new memory from the system from its second
    pass on. What that saves depends on the machine and the image (see docs/performance.md): most where the image is
    large, and on virtual machines that give freed pages back to their host. Where something new is needed, the oldest
    of what is kept is freed until both are within the limit.

    Args:
        limit: bytes; 0 keeps nothing.

    Returns:
        The limit before; 0 where the C++ library is not there.

    Raises:
        TypeError, ValueError: if `limit` is not a number of bytes from 0 on.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit: expected a number of bytes, got {type(limit).__name__}")
    if limit < 0:
        raise ValueError(f"limit: expected a number of bytes from 0 on, got {limit}")
    return _dispatch.native.limit_workspace(limit) if _dispatch.native is not None else 0


def concatenate(first: Tensor, second: Tensor) -> Tensor:
    """``torch.cat((first, second), 1)`` without a gradient; on CPUs a large result takes its memory from the workspace.

    Args:
        first, second: [B, C, H, W] and [B, D, H, W].

    Returns:
        [B, C + D, H, W], contiguous where it is taken from the workspace.

    Raises:
        RuntimeError: a shape or device does not fit (from ``torch.cat``).
    """
    tensors = [first.detach(), second.detach()]
    plain = all(type(t) is Tensor and t.device.type == "cpu" and t.dim() == 4 for t in (first, second))
    if not plain or _dispatch.native is None or first.dtype != second.dtype:
        return torch.cat(tensors, 1)
    batch, channels, *size = first.shape
    joined = _library.result((batch, channels + second.shape[1], *size), first.dtype)
    return torch.cat(tensors, 1, out=joined)
