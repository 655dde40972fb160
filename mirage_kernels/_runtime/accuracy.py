"""How far from the truth an implementation may be, for the tests and for ``mirage doctor``.

Truth is the reference in float64. A float32 result may be at most twice as far from it as eager PyTorch in float32; a
16-bit result no further than eager in the same dtype. A result as good as rounding the truth always passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., Tensor]
Errors = list[list[float]]  # for each input, of each result

TIMES_EAGER = {torch.float32: 2.0, torch.float16: 1.0, torch.bfloat16: 1.0}
"""The error of a result may be this many times eager's at the same dtype."""
FLOAT64 = 1e-14
"""In float64 eager is the truth itself; this relative error leaves room for another order of summation only."""
ROUNDING_NOISE = 1.05
"""Two correctly summed results of a 16-bit tensor round a few elements differently; this much is not an error."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth (over 1 where the truth is zero)."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    norm = truth.norm().item()
    return ((value - truth).norm() / (norm or 1.0)).item()


def unavoidable(truth: Tensor, dtype: torch.dtype) -> float:
    """The error of rounding the truth; in float32, where eager may be lucky on a handful of sums, one epsilon."""
    rounded = ROUNDING_NOISE * relative_error(truth.to(dtype), truth)
    return max(rounded, torch.finfo(dtype).eps) if dtype == torch.float32 else rounded


def cancellation(terms: Tensor | None, exact: Tensor) -> float:
    """How much larger the terms of a sum are than the sum, at least 1."""
    return 1.0 if terms is None else max(1.0, (terms.norm() / exact.norm()).item())


def allowed(
    dtype: torch.dtype, result: torch.dtype, exact: Tensor, eager_error: float, terms: Tensor | None = None
) -> float:
    """The largest relative error that passes.

    Args:
        dtype: of the arguments; `result`: of the tensor that is compared with `exact`.
        eager_error: that of the reference at `dtype`.
        terms: of a tensor that is one sum over everything, its terms. Such a sum may cancel, and then the rounding of
            its terms is no error of an implementation. Independent ones add up to the root of the sum of their squares.
    """
    cancels = cancellation(terms, exact)
    if dtype == torch.float64:
        return FLOAT64 * cancels
    floor = unavoidable(exact, result)
    if terms is not None and dtype == torch.float32:
        floor *= TIMES_EAGER[dtype] * cancels
    return max(TIMES_EAGER[dtype] * ROUNDING_NOISE * eager_error, floor)


@dataclass(frozen=True)
class Comparison:
    """One result of an operator: its name, relative error, and the largest error that passes."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN does not


def evaluate(
    function: Function, tensors: Sequence[Tensor], grad_output: Tensor | None = None, differentiate: bool = True
) -> list[Tensor]:
    """[output, gradient of every tensor]; the gradient of the output is a fixed random tensor unless given."""
    output = function(*tensors)
    if not differentiate:
        return [output]
    grad_output = random_like(output) if grad_output is None else grad_output
    return [output, *torch.autograd.grad(output, tensors, grad_output)]


def random_like(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)


def in_float64(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


def compare(
    public: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    grad_output: Tensor,
    names: Sequence[str],
    *,
    terms: Mapping[str, Tensor] | None = None,
    roundings: int = 1,
    runs: int | None = None,
    differentiate: bool = True,
    of_scalars: str = "",
    known: tuple[list[Tensor], list[Tensor]] | None = None,
) -> list[Comparison]:
    """Every result of `public` beside those of `reference` in float64 and in the dtype of the inputs.

    After a long chain of roundings the error of a few numbers is a matter of luck: where one result is too far off, the
    errors are taken from equivalent inputs (perturbed in their last bit), eager's as the largest, the operator's as the
    median.

    Args:
        inputs: the arguments, requiring their gradients.
        names: of the output and of the gradients.
        terms: see :func:`allowed`, by name.
        roundings: the number of equivalent inputs, with `inputs`; three for large ones.
        runs: of `public`, on the first of these inputs, where it takes long; all by default.
        of_scalars: a name under which gradients of one number are compared as one vector; without it, one by one.

        known: what :func:`evaluate` gives of `reference` on `inputs` and on them in float64, where that is known.

    Raises:
        ValueError: if a result has another shape or dtype than the reference's.
    """
    terms = terms or {}

    def run(function: Function, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        return _joined(evaluate(function, tensors, grad, differentiate), of_scalars)

    def exactly(tensors: Sequence[Tensor]) -> list[Tensor]:
        return run(reference, in_float64(tensors), grad_output.double().cpu())

    results = run(public, inputs, grad_output)
    eager, truth = known or (run(reference, inputs, grad_output), exactly(inputs))
    if of_scalars and differentiate:
        names = [name for name, t in zip(names, (truth[0], *inputs), strict=True) if name == names[0] or t.numel() > 1]
        names = [*names, of_scalars][: len(truth)]
    for name, value, peer in zip(names, results, eager, strict=True):
        if value.shape != peer.shape or value.dtype != peer.dtype:
            got, expected = (f"{t.dtype} of shape {list(t.shape)}" for t in (value, peer))
            raise ValueError(f"{name}: expected {expected} like the reference's, got {got}")
    own: Errors = [list(map(relative_error, results, truth))]
    peers: Errors = [list(map(relative_error, eager, truth))]

    def judged() -> list[Comparison]:
        found = []
        for i, (name, value, exact) in enumerate(zip(names, results, truth, strict=True)):
            errors = [of_input[i] for of_input in own]
            limit = allowed(
                inputs[0].dtype, value.dtype, exact, max(of_input[i] for of_input in peers), terms.get(name)
            )
            found.append(Comparison(name, min(errors[0], statistics.median(errors)), limit))
        return found

    found = judged()
    if roundings == 1 or all(comparison.passed for comparison in found):
        return found
    generator = torch.Generator().manual_seed(17)
    for i in range(roundings - 1 if inputs[0].numel() < 1e5 else 2):
        noise = [torch.randn(t.shape, generator=generator).to(t) * torch.finfo(t.dtype).eps for t in inputs]
        other = [(t.detach() * (1 + n)).requires_grad_() for t, n in zip(inputs, noise, strict=True)]
        exact = exactly(other)
        peers.append(list(map(relative_error, run(reference, other, grad_output), exact)))
        if runs is None or i + 1 < runs:
            own.append(list(map(relative_error, run(public, other, grad_output), exact)))
    return judged()


def _joined(results: list[Tensor], of_scalars: str) -> list[Tensor]:
    """The gradients of one number as one vector, the last result."""
    if not of_scalars:
        return results
    output, *gradients = results
    scalars = [g.flatten() for g in gradients if g.numel() == 1]
    others = [g for g in gradients if g.numel() != 1]
    return [output, *others, *([torch.cat(scalars)] if scalars else [])]
