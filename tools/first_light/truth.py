"""Whether numbers are right: operators and stages beside float64, the golden network, and the same bits twice."""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mirage_kernels
from mirage import self_check
from mirage_kernels._runtime import accuracy
from mirage_kernels._runtime.cases import Operator, operators
from tools.first_light.pool import Row

ON_HOST = {"triton": ("bfloat16", "Triton's interpreter truncates to bfloat16, where a GPU rounds")}
"""Of implementations where there is no GPU: a dtype that is left out, and why."""


def case_of(name: str, mode: str) -> Operator:
    return next(case for case in operators([name]) if case.mode == mode)


def missing(implementation: str) -> Row | None:
    """A row where an implementation is not there."""
    state = mirage_kernels.available().get(implementation, "yes")
    return None if state == "yes" else {"status": "left out", "problem": state}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh memory is NaN, so that an element which no kernel wrote is seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators of PyTorch that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def operator(
    name: str, mode: str, implementation: str, dtype: str, shape: list[int], size: str, device: str
) -> Iterator[Row]:
    """An operator forward and backward: its error beside float64 and the largest that is allowed, both of the result
    that is nearest to it, and why kernels declined where others ran in their place."""
    left_out, why = ON_HOST.get(implementation, ("", ""))
    if device == "cpu" and dtype == left_out:
        yield {"status": "left out", "problem": why}
        return
    if absent := missing(implementation):
        yield absent
        return
    case = case_of(name, mode)
    with poisoned():
        check = self_check.check_operator(case, implementation, device, getattr(torch, dtype), tuple(shape))
    directions = {"forward": name, "backward": f"{name}_backward"}
    reasons = {key: mirage_kernels.why_not(called).get(implementation) for key, called in directions.items()}
    declined = {key: reason for key, reason in reasons.items() if reason}
    row: Row = {"error": check.error, "allowed": check.limit, "where": check.where, "declined": declined}
    if check.problem is not None and check.problem.endswith("ran in its place"):
        row |= {"status": "left out", "problem": f"{check.problem}: {'; '.join(declined.values())}"}
    elif check.problem is not None:
        lost = "OutOfMemoryError" in check.problem
        row |= {"status": "out of memory" if lost else "failed", "problem": check.problem[:600]}
    elif not check.passed:
        row |= {"status": "wrong", "problem": f"{check.where} is {check.error:.1e} off, {check.limit:.1e} are allowed"}
    yield row


def golden(case: str, mode: str, implementation: str, device: str) -> Iterator[Row]:
    """A whole network with weights that anyone can regenerate beside what the released one computes in float64."""
    tests: Any = importlib.import_module("test_fast_golden")  # of tests/mirage, which is on the path
    if absent := missing(implementation):
        yield absent
        return
    seen: list[Any] = []

    def compare(factory: Callable[..., Any]) -> Any:
        seen.append(tests.compare_model(case, factory, torch.float32, mode, device))
        return seen[-1]

    row: Row = {}
    try:
        with mirage_kernels.use(implementation), self_check.exact_float32():
            tests.assert_parity(compare, tests.accelerated(case))
    except AssertionError as error:
        row = {"status": "wrong", "problem": str(error)[:600]}
    except tests.pytest.skip.Exception as reason:  # its file is not here
        yield {"status": "left out", "problem": str(reason)}
        return
    found = [comparison for group in seen[0].values() for comparison in group.values()]
    worst = max(found, key=lambda c: math.inf if math.isnan(c.error) else c.error / c.limit)
    yield {"error": worst.error, "allowed": worst.limit, "compared": len(found), **row}


def repeats(
    name: str, mode: str, implementation: str, dtype: str, shape: list[int], size: str, device: str
) -> Iterator[Row]:
    """Whether an operator gives the same bits again, forward and backward, with other memory around it."""
    if absent := missing(implementation):
        yield absent
        return
    case = case_of(name, mode)
    inputs = [t.requires_grad_(case.gradients) for t in case.inputs(tuple(shape), getattr(torch, dtype), device)]
    with mirage_kernels.use(implementation):
        run = partial(accuracy.evaluate, case.public, inputs, differentiate=case.gradients)
        first, kept = run(), []
        for _ in range(3):
            kept.append(torch.full_like(inputs[0], float("nan")))
            names = ["output", *(f"grad {argument}" for argument in case.arguments)]
            changed = [n for n, a, b in zip(names, first, run(), strict=False) if not same_bits(a, b)]
            if changed:
                yield {"status": "wrong", "problem": f"not the same bits again: {', '.join(changed)}"}
                return
    yield {}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)  # NaN is no answer either


KINDS = {"operator": operator, "golden": golden, "repeats": repeats}
