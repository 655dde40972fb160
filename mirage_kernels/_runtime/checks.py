"""Argument checks of the public functions: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x: there are devices that it does not know, and asking raises."""
    device = x.device.type
    return (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def dtype_of_convolutions(x: Tensor) -> torch.dtype:
    """That of a convolution of x by PyTorch: autocast's where it is on, else that of x."""
    if x.dtype == torch.float64 or not under_autocast(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def check_tensor(name: str, value: object, ndim: int | None = None) -> None:
    """A floating-point tensor of `ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {value.dtype}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {list(value.shape)}")


def check_shape(name: str, value: Tensor, shape: Sequence[int], why: str = "") -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}{why and f' ({why})'}, got {list(value.shape)}")


def check_same_device(first_name: str, first: Tensor, **others: Tensor) -> None:
    for name, value in others.items():
        if value.device != first.device:
            raise ValueError(f"{name}: expected a tensor on {first.device} like {first_name}, got {value.device}")


def check_same_dtype(first_name: str, first: Tensor, **others: Tensor) -> None:
    for name, value in others.items():
        if value.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} like {first_name}, got {value.dtype}")


def check_tensors(
    first_name: str,
    first: Tensor,
    values: Iterable[Any],
    shapes: Mapping[str, Sequence[int]],
    why: str,
    optional: Collection[str] = (),
) -> None:
    """Floating-point tensors of `shapes`, in that order, on the device of `first`; None where they are `optional`.

    One look at what almost always holds comes first: a fifth of the time that the checks by name take.
    """
    values, device = tuple(values), first.device
    for value, (name, shape) in zip(values, shapes.items(), strict=True):
        if value is None and name in optional:
            continue
        if type(value) not in _PLAIN or value.dtype not in FLOATING or value.shape != shape or value.device != device:
            break
    else:
        return
    found = zip(shapes, values, strict=True)
    named = {name: value for name, value in found if value is not None or name not in optional}
    for name, value in named.items():
        check_tensor(name, value)
    for name, value in named.items():
        check_shape(name, value, shapes[name], why)
    check_same_device(first_name, first, **named)
