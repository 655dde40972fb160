"""What the operators in CUDA C++ share: the library, its stream and scratch memory, types of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_kernels._runtime import dispatch
from mirage_kernels._runtime.library import to_dlpack

FAR = 1 << 25  # elements between rows or columns, see kFar in csrc/common/cuda/call_checks.h


def library() -> Any:
    """The extension module; callers run only where dispatch has found it."""
    return dispatch.cuda


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[int]:
    """Inside, x's GPU is the current one; gives its current stream as an integer."""
    if x.device.type != "cuda":  # emulated
        yield 0
        return
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream


def on_device(x: Tensor, name: str, *arguments: Any) -> Any:
    """What a function of the library says where x's GPU is the current one."""
    with on_device_of(x):
        return getattr(library(), name)(*arguments)


def call(name: str, tensors: Sequence[Tensor], workspace_bytes: int = 0, tf32: bool = False) -> None:
    """A function of the library on the GPU of the first tensor, with so much scratch memory, on the current stream."""
    memory = workspace(workspace_bytes, tensors[0])
    with on_device_of(tensors[0]) as stream:
        getattr(library(), name)(list(map(to_dlpack, tensors)), to_dlpack(memory), stream, tf32)


def problem(x: Tensor, workspace_function: str, *arguments: Any) -> str:
    """Why a stage's kernels do not take such an `x`; empty where they do: the library then tells the bytes of scratch
    memory that they need, and None where there is no kernel for so many channels or not the shared memory for one."""
    if on_device(x, workspace_function, *arguments) is not None:
        return ""
    stage = workspace_function.removesuffix("_workspace")
    return f"no kernel of {stage} takes x of shape {list(x.shape)} in {x.dtype} on {_device_name(x)}"


def _device_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "the emulated GPU"


def workspace(size: int, x: Tensor) -> Tensor:
    """`size` bytes of scratch memory, aligned for every type."""
    return torch.empty(-(-size // 4), dtype=torch.float32, device=x.device)


def of_one_dtype(dtype: torch.dtype, *weights: Tensor) -> list[Tensor]:
    """The weights contiguous and all of `dtype`, or else all of float32."""
    if any(w.dtype != dtype for w in weights):
        dtype = torch.float32
    return [w.to(dtype).contiguous() for w in weights]


def near(maps: Tensor) -> Tensor:
    """`maps` [B, C, H, W], or a contiguous copy where its pixels lie further apart than the stages' kernels take."""
    return maps.contiguous() if is_far(maps) else maps


def as_if_near(maps: Tensor) -> Tensor:
    """`near(maps)` without its values."""
    return torch.empty(maps.shape, dtype=maps.dtype, device=maps.device) if is_far(maps) else maps


def is_far(maps: Tensor) -> bool:
    return any(size > 1 and stride >= FAR for size, stride in zip(maps.shape[2:], maps.stride()[2:], strict=True))
