"""``feed_forward_stage`` in Triton. `plan` has the sizes of the launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from mirage_kernels._triton.cases import meta, stage_variants
from mirage_kernels.feed_forward_stage.triton.backward import backward
from mirage_kernels.feed_forward_stage.triton.forward import forward
from mirage_kernels.feed_forward_stage.triton.plan import can_run, can_run_backward
from mirage_kernels.feed_forward_stage.weights import shapes

__all__ = ["backward", "can_run", "can_run_backward", "forward", "triton_cases"]


def triton_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_triton.py compiles for GPUs that are not there."""
    for label, (channels, side), dtype, wide in stage_variants():
        weights = [meta(*shape, dtype=dtype) for shape in shapes(channels, 2 * channels).values()]
        yield label, partial(_compile, meta(1, channels, side, side, dtype=dtype, wide=wide), *weights, 1e-5)


def _compile(x: Tensor, *arguments: Any) -> None:
    """Forward, and backward where it has kernels."""
    forward(x, *arguments)
    if can_run_backward(x):
        backward(x, x, *arguments)
