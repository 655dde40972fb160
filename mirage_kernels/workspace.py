"""Memory that the C++ kernels keep between calls, and five functions of PyTorch whose large results are taken from it.

They are what their namesakes in PyTorch are, with gradients, in traces and under transforms: only where nobody
could see the difference does their memory come from elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import dispatch, library, transforms


def release_workspace() -> int:
    """Give the memory that the C++ kernels keep between calls back to the system.

    It is scratch memory and the memory of large results that nothing refers to any more: taken again by the next call,
    rather than mapped, cleared and unmapped by the operating system each time. See :func:`limit_workspace`.

    Returns:
        How many bytes were kept; 0 where the C++ library is not there.
    """
    return dispatch.native.release_workspace() if dispatch.native is not None else 0


def limit_workspace(limit: int) -> int:
    """Set how much memory the C++ kernels keep between calls, for the whole process.

    Unless this says otherwise it is 2 GiB, or an eighth of the machine's memory if that is less; hardly more than
    was ever in use at once. A network whose feature maps fit takes no new memory from the system from its second
    pass on. What that saves depends on the machine and the image (see docs/performance.md): most where the image is
    large, and on virtual machines that give freed pages back to their host. Where new pages are needed, free ones
    are given back until both are within the limit. Results of 64 KiB or more live there: tensors like any other,
    except that their storage cannot be resized in place (``resize_``).

    Args:
        limit: bytes; 0 keeps nothing but the free rest of a page that is in use in part.

    Returns:
        The limit before; 0 where the C++ library is not there.

    Raises:
        TypeError, ValueError: if `limit` is not a number of bytes from 0 on.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit: expected a number of bytes, got {type(limit).__name__}")
    if limit < 0:
        raise ValueError(f"limit: expected a number of bytes from 0 on, got {limit}")
    return dispatch.native.limit_workspace(limit) if dispatch.native is not None else 0


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like(x)``, contiguous; on CPUs the memory of a large one is taken from the workspace.

    Args:
        x: [B, C, H, W], any dtype.
    """
    if not _takes(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return library.result(x.shape, x.dtype)


def concatenate(first: Tensor, second: Tensor) -> Tensor:
    """``torch.cat((first, second), 1)``; on CPUs a large result takes its memory from the workspace.

    Args:
        first, second: [B, C, H, W] and [B, D, H, W], any dtype.

    Returns:
        [B, C + D, H, W], contiguous where it is taken from the workspace: where no gradient is wanted.

    Raises:
        RuntimeError: a shape or device does not fit (from ``torch.cat``).
    """
    if not _takes(first, second) or first.dtype != second.dtype:
        return torch.cat((first, second), 1)
    batch, channels, *size = first.shape
    joined = library.result((batch, channels + second.shape[1], *size), first.dtype)
    return torch.cat((first, second), 1, out=joined)


def add(first: Tensor, second: Tensor) -> Tensor:
    """``first + second``; on CPUs a large result takes its memory from the workspace.

    Args:
        first, second: [B, C, H, W], any dtype.

    Returns:
        [B, C, H, W], contiguous where it is taken from the workspace: where no gradient is wanted.

    Raises:
        RuntimeError: a shape or device does not fit (from ``torch.add``).
    """
    if not _takes(first, second) or first.dtype != second.dtype or first.shape != second.shape:
        return first + second
    return torch.add(first, second, out=library.result(first.shape, first.dtype))


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_shuffle``; on CPUs a large result takes its memory from the workspace where no gradient is wanted.

    Args:
        x: [B, C * factor^2, H, W], any dtype.
        factor: of the enlargement.

    Returns:
        [B, C, H * factor, W * factor], contiguous where `x` is.

    Raises:
        RuntimeError: the channels do not divide (from ``F.pixel_shuffle``).
    """
    if not _takes(x) or not x.is_contiguous() or factor < 1 or x.shape[1] % factor**2:
        return torch.nn.functional.pixel_shuffle(x, factor)
    batch, channels, height, width = x.shape[0], x.shape[1] // factor**2, *x.shape[2:]
    blocks = (batch, channels, factor, factor, height, width)
    return _reordered(x.view(blocks), (0, 1, 4, 2, 5, 3), (batch, channels, height * factor, width * factor))


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_unshuffle``; on CPUs a large result takes its memory from the workspace where no gradient is wanted.

    Args:
        x: [B, C, H * factor, W * factor], any dtype.
        factor: of the reduction.

    Returns:
        [B, C * factor^2, H, W], contiguous where `x` is.

    Raises:
        RuntimeError: height or width do not divide (from ``F.pixel_unshuffle``).
    """
    if not _takes(x) or not x.is_contiguous() or factor < 1 or x.shape[2] % factor or x.shape[3] % factor:
        return torch.nn.functional.pixel_unshuffle(x, factor)
    batch, channels, height, width = x.shape[0], x.shape[1], x.shape[2] // factor, x.shape[3] // factor
    blocks = (batch, channels, height, factor, width, factor)
    return _reordered(x.view(blocks), (0, 1, 3, 5, 2, 4), (batch, channels * factor**2, height, width))


def _reordered(blocks: Tensor, dims: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """``blocks.permute(dims).reshape(shape)``, the memory from the workspace."""
    blocks = blocks.permute(dims)
    y = library.result(shape, blocks.dtype)
    y.view(blocks.shape).copy_(blocks)
    return y


def _takes(*tensors: Tensor) -> bool:
    """Whether a result may be written past the dispatcher, into memory that the C++ library made: no gradient is
    wanted, and nobody records or transforms the call. Small ones gain nothing; of empty ones PyTorch 2.13's
    ``pixel_unshuffle`` leaves the shape as it was."""
    if torch.compiler.is_compiling() or not all(type(t) in transforms.PLAIN_TYPES for t in tensors):
        return False
    if 0 < sum(t.nbytes for t in tensors) < library.KEPT_FROM or not dispatch.may_run("cpp"):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(t.dim() == 4 for t in tensors) and transforms.nobody_watches(*tensors)
