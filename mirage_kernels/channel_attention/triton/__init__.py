"""``channel_attention`` in Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from mirage_kernels.channel_attention.triton.backward import backward
from mirage_kernels.channel_attention.triton.forward import forward
from mirage_kernels.channel_attention.triton.plan import attention_cases

__all__ = ["backward", "forward", "triton_cases"]


def triton_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_triton.py compiles for GPUs that are not there."""
    for label, x, matrices, temperature in attention_cases():
        yield label, partial(forward, x, x, x, temperature, matrices.shape[1])
        yield label, partial(backward, x, x, x, x, temperature, matrices)
