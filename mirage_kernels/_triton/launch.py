"""What the Triton kernels of all operators share: launching, pixel addressing, widths of offsets, and the GELU."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels._runtime import tuning
from mirage_kernels._runtime.library import is_exact
from mirage_kernels._runtime.tuning import FP_FUSION

_OF_A_LAUNCH = frozenset(("num_warps", "num_stages"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Called instead of launching while set: tools/compile_triton.py compiles every launch for a GPU that is not there.
launch_hook: Callable[..., None] | None = None


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **named: Any) -> None:
    """Run `programs` instances of `kernel`, all on grid axis 0 (axes 1 and 2 end at 65535).

    Arguments are passed by name, those of short kernels by position: a swap of two pointers would show in numbers only.
    Constants (``tl.constexpr``), warps and stages always have names.

    Raises:
        TypeError: naming an argument that the kernel has not, or that is missing.
    """
    args, options = _by_position(kernel, args, named)
    if launch_hook is not None:
        launch_hook(kernel, programs, args, options)
    elif programs == 0:
        return
    elif device.type == "cuda":
        options = tuning.apply(kernel, device, args, options)
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **options, **FP_FUSION)
    else:
        kernel[(programs,)](*args, **options, **FP_FUSION)


@functools.cache
def _parameters(kernel: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of the arguments that are no constants, which come first, in order; and those of the constants."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    constants = frozenset(p.name for p in parameters if p.annotation in (tl.constexpr, "tl.constexpr"))
    return tuple(p.name for p in parameters if p.name not in constants), constants


def _by_position(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What tuning files and tools know a launch by: its arguments in order; constants, warps and stages by name."""
    names, constants = _parameters(kernel)
    if len(args) > len(names):
        raise TypeError(f"{kernel.__name__}: expected at most {len(names)} arguments by position, got {len(args)}")
    rest = names[len(args) :]
    missing = [name for name in rest if name not in named] + sorted(constants.difference(named))
    unknown = sorted(set(named).difference(rest, constants, _OF_A_LAUNCH))
    if missing or unknown:
        raise TypeError(f"{kernel.__name__}: missing arguments {missing}, unknown or repeated ones {unknown}")
    options = {name: value for name, value in named.items() if name in constants or name in _OF_A_LAUNCH}
    return (*args, *(named[name] for name in rest)), options


def needs_int64(*tensors: Tensor) -> bool:
    """True where an element offset of one of the tensors can pass 2^31 - 1: a constexpr of the kernels."""
    return any(_reach(t) > 2**31 - 1 for t in tensors)


def _reach(t: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def is_flat_plane(t: Tensor) -> bool:
    """True where all pixels of a plane of [B, C, H, W] are equally spaced, so that a plane is one long row."""
    return t.shape[2] <= 1 or t.stride(2) == t.shape[3] * t.stride(3)


def plane_strides(t: Tensor, prefix: str = "s") -> dict[str, int]:
    """Strides of [B, C, H, W] for :func:`pixel_offsets`, as arguments ``s_b``, ``s_c``, ``s_row`` and ``s_pixel``."""
    pixel = t.stride(3) if t.shape[3] > 1 or t.shape[2] <= 1 else t.stride(2)
    return _strides(prefix, t.stride(0), t.stride(1), t.stride(2), pixel)


def image_strides(t: Tensor, prefix: str = "s") -> dict[str, int]:
    """As :func:`plane_strides`, for kernels that take rows and columns."""
    return _strides(prefix, *t.stride())


def _strides(prefix: str, *strides: int) -> dict[str, int]:
    return {f"{prefix}_{name}": stride for name, stride in zip(("b", "c", "row", "pixel"), strides, strict=True)}


def pointers(weights: Any, *names: str) -> dict[str, Tensor]:
    """Fields of a NamedTuple of tensors as the arguments ``p_<name>``."""
    return {f"p_{name}": getattr(weights, name) for name in names}


def precision_of_widened(dtype: torch.dtype) -> str:
    """The precision of `tl.dot` on float32 values that come from `dtype`: 16-bit values are exact in TF32."""
    return "ieee" if is_exact(dtype) else "tf32"


@triton.jit
def pixel_offsets(o_n, W, s_row, s_pixel, LINE: tl.constexpr):
    """Offsets of the pixels o_n (counted along H * W) inside a plane."""
    if LINE:
        return o_n * s_pixel
    else:
        return (o_n // W) * s_row + (o_n % W) * s_pixel


@triton.jit
def index_dtype(o, INT64: tl.constexpr):
    """Indices or a size that are going to be multiplied by strides, in 64 bit where offsets need it."""
    if INT64:
        o = tl.cast(o, tl.int64)
    return o


@triton.jit
def _normal_cdf(b_x):
    return 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)


@triton.jit
def gelu(b_x):
    return b_x * _normal_cdf(b_x)


@triton.jit
def gelu_slope(b_x):
    """The derivative of :func:`gelu`."""
    return _normal_cdf(b_x) + b_x * tl.exp(-0.5 * b_x * b_x) * 0.3989422804014327
