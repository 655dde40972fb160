"""What both attention operators check."""

from __future__ import annotations

from torch import Tensor

from mirage_kernels._runtime import checks, dispatch

CUDA_CHANNELS = 64
"""The most channels of a head that the kernels in CUDA C++ take."""


def declined(q: Tensor, num_heads: int) -> dict[str, str]:
    """The implementations that do not take such heads, and why."""
    channels = q.shape[1] // num_heads
    if channels <= CUDA_CHANNELS:
        return dispatch.NONE
    return {"cuda": f"its kernels take heads of up to {CUDA_CHANNELS} channels, not of {channels}"}


def check_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, num_heads: int) -> None:
    checks.check_tensor("q", q, ndim=4)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1 or q.shape[1] % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {q.shape[1]} channels of q, got {num_heads}")
    for name, value in (("k", k), ("v", v)):
        checks.check_tensor(name, value, ndim=4)
        checks.check_shape(name, value, q.shape, "like q")
    checks.check_tensor("temperature", temperature)
    if tuple(temperature.shape) not in ((num_heads,), (num_heads, 1, 1)):
        expected = f"[{num_heads}, 1, 1] or [{num_heads}] (one value per head)"
        raise ValueError(f"temperature: expected shape {expected}, got {list(temperature.shape)}")
    checks.check_same_device("q", q, k=k, v=v, temperature=temperature)
    checks.check_same_dtype("q", q, k=k, v=v)
