"""Every operator on every implementation that can run here, beside float64: what ``mirage doctor`` reports.

Each is run forward and backward on the tensors of its ``cases.py`` and judged as in the tests: see
:mod:`mirage_kernels._runtime.accuracy`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.utils.benchmark
from torch import Tensor

import mirage_kernels
from mirage_kernels._runtime import accuracy
from mirage_kernels._runtime.cases import DIMS, Operator, Shape, operators

__all__ = ["Check", "check_operators"]

ROUNDINGS = 9
"""Inputs that differ in their last bits, from which errors are taken where one is too large: see `accuracy.compare`."""
LARGE = 256
"""Side of the image whose blocks are large: with enough tiles for the kernels of whole stages."""
SECONDS = 0.2
"""For which each call is repeated where it is timed."""


@dataclass(frozen=True)
class Check:
    """One operator run by one implementation on one device.

    Attributes:
        operator: its name, and its mode where it has several, such as ``mixer_stage training``.
        dtype: of the tensors, such as ``float32``.
        error: relative error (norm of the difference over norm of the truth) of the output or gradient that is nearest
            to its limit, or past it.
        where: the tensor it occurred in: ``output``, ``grad 0``, ``grad 1``, ... by argument, or ``grad of scalars``.
        limit: largest error allowed for that tensor.
        problem: what went wrong instead of a comparison, or None.
        milliseconds: median time of forward and backward (of forward, for an operator without gradients), or None.
    """

    operator: str
    implementation: str
    device: str
    dtype: str
    error: float | None
    where: str
    limit: float | None
    problem: str | None = None
    milliseconds: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every tensor was within its limit."""
        return (
            self.problem is None and self.error is not None and self.limit is not None and self.error <= self.limit
        )


def check_operators(
    chosen: Sequence[Operator] | None = None,
    device: str | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    timed: bool = False,
    large: bool = False,
) -> tuple[Check, ...]:
    """Check each operator on each implementation and device that can run, forward and backward.

    Args:
        chosen: what to check; every operator by default.
        device: ``"cpu"`` or ``"cuda"``; all by default.
        dtypes: of the tensors.
        timed: also time each call, for `SECONDS`.
        large: on the maps of a block of MIRAGE-T, instead of a few pixels.
    """
    runnable = [name for name, state in mirage_kernels.available().items() if state == "yes"]
    checks = []
    for operator in operators() if chosen is None else chosen:
        for dtype in dtypes:
            for implementation in runnable:
                if implementation in ("torch", *operator.implementations):
                    for place in _devices_of(implementation):
                        if implementation == "triton" and place == "cpu" and operator.mode:
                            continue  # a minute in the interpreter
                        if device in (None, place):
                            shape = operator.in_network(DIMS["tiny"], LARGE)[:3][-1] if large else None
                            checks.append(check_operator(operator, implementation, place, dtype, shape, timed))
    return tuple(checks)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, PyTorch's convolutions of float32 on a GPU are of float32: by itself it rounds their factors to TF32, a
    thousand times the error of our kernels, and eager's error is the measure of theirs."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _devices_of(implementation: str) -> list[str]:
    gpu = ["cuda"] if torch.cuda.is_available() else []
    on_host = {"triton": "TRITON_INTERPRET", "cuda": "MIRAGE_CUDA_EMULATE"}.get(implementation)
    if on_host is not None:
        return ["cpu"] if os.environ.get(on_host) == "1" else gpu
    return {"torch": ["cpu", *gpu], "cpp": ["cpu"]}.get(implementation, [])


def check_operator(
    operator: Operator,
    implementation: str,
    device: str,
    dtype: torch.dtype,
    shape: Shape | None = None,
    timed: bool = False,
) -> Check:
    """One of :func:`check_operators`, on tensors of a `shape` that its ``make`` takes, else the first of its own."""
    label = f"{operator.name} {operator.mode}".strip()
    check = partial(Check, label, implementation, device, str(dtype).removeprefix("torch."))
    inputs = [t.requires_grad_(operator.gradients) for t in operator.inputs(shape or operator.shapes[0], dtype, device)]

    def public(*tensors: Tensor) -> Tensor:
        with mirage_kernels.use(implementation):
            return operator.public(*tensors)

    def once() -> None:
        accuracy.evaluate(public, inputs, grad_output, operator.gradients)

    milliseconds = None
    try:
        with exact_float32():
            with torch.no_grad():
                grad_output = accuracy.random_like(operator.reference(*inputs))
            found = accuracy.compare(
                public,
                operator.reference,
                inputs,
                grad_output,
                ["output", *(f"grad {i}" for i in range(len(inputs) if operator.gradients else 0))],
                roundings=ROUNDINGS,
                runs=3 if implementation == "triton" and device == "cpu" else None,  # in the interpreter one takes long
                differentiate=operator.gradients,
                of_scalars="grad of scalars",
            )
        ran = mirage_kernels.last_used(operator.name)
        if timed:
            timer = torch.utils.benchmark.Timer("once()", globals={"once": once})
            milliseconds = 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median
    except Exception as error:  # a broken kernel may raise anything; the others are still to be checked
        return check(None, "", None, f"{type(error).__name__}: {error}")
    if ran != implementation:
        return check(None, "", None, f"{ran} ran in its place")
    worst = _worst(found)
    return check(worst.error, worst.name, worst.allowed, milliseconds=milliseconds)


def _worst(found: Sequence[accuracy.Comparison]) -> accuracy.Comparison:
    """The one that takes most of what is allowed; a NaN is the worst error."""

    def share(result: accuracy.Comparison) -> float:
        if math.isnan(result.error):
            return math.inf
        if result.allowed == 0:
            return math.inf if result.error else 0.0
        return result.error / result.allowed

    return max(found, key=share)
