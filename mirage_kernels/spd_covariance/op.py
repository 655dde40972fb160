"""The public function ``spd_covariance`` and its registration with PyTorch."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, accumulator, define
from mirage_kernels.spd_covariance.cases import CASES, flops
from mirage_kernels.spd_covariance.reference import spd_covariance as reference

_implementations = Implementations(__package__)


def spd_covariance(x: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Covariance of the channels over all positions, regularised to be symmetric positive definite.

    .. math:: y_b = \frac{(X_b - \mu_b) (X_b - \mu_b)^T}{N - 1} + \epsilon I

    with :math:`X_b` sample b as a [C, N] matrix and :math:`\mu_b` the means of its rows: the features that the SPD head
    of MIRAGE (arXiv 2505.18679, section 3.3) embeds. Sums are centred, so a large common offset loses no accuracy.

    Args:
        x: [B, C, ...], at least one dimension after the channels and N >= 2 positions in all of them together;
            float32, float64, float16 or bfloat16, any strides.
        eps: Added to the diagonal.

    Returns:
        [B, C, C], contiguous, exactly symmetric, of the dtype of `x`. Under autocast too, as in the reference, whose
        product is then rounded to 16 bits; here only the result is, where `x` has 16 bits.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype or shape.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    checks.check_tensor("x", x)
    if x.dim() < 3:
        raise ValueError(f"x: expected [B, C, ...] with at least 3 dimensions, got shape {list(x.shape)}")
    if prod(x.shape[2:]) < 2:
        raise ValueError(f"x: expected at least 2 positions to take a covariance over, got shape {list(x.shape)}")
    impl = dispatch.choose("spd_covariance", x)
    if impl == "torch":
        return reference(x, eps)
    if x.dtype in (torch.float16, torch.bfloat16) and checks.under_autocast(x):
        # The reference adds its autocast product to an identity of the dtype of x.
        x = x.to(torch.promote_types(x.dtype, torch.get_autocast_dtype(x.device.type)))
    return _forward_op(x if x.dim() == 4 else x.flatten(2).unsqueeze(2), eps, impl)[0]


def _forward(x: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    dispatch.record("spd_covariance", impl)
    return _implementations[impl].forward(x, eps)


def _plain(x: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    mean = x.to(accumulator(x.dtype)).mean((2, 3))
    return reference(x, eps), torch.stack((mean, torch.zeros_like(mean)), 1)


def _forward_fake(x: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    return x.new_empty(batch, channels, channels), x.new_empty(batch, 2, channels, dtype=accumulator(x.dtype))


def _backward(grad_y: Tensor, x: Tensor, mean: Tensor, impl: str) -> Tensor:
    return _implementations[impl].backward(grad_y, x, mean)


def _backward_fake(grad_y: Tensor, x: Tensor, mean: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, ctx.impl = inputs
    ctx.save_for_backward(x, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_mean: None) -> tuple[Any, ...]:
    if grad_y is None:
        return None, None, None
    return _backward_op(grad_y, *ctx.saved_tensors, ctx.impl), None, None


_backward_op = define(
    "spd_covariance_backward", "(Tensor grad_y, Tensor x, Tensor mean, str impl) -> Tensor", _backward, _backward_fake
)
_forward_op = define(
    "spd_covariance",
    "(Tensor x, float eps, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    plain=_plain,
)
register_flops("spd_covariance", flops)
register(CASES, spd_covariance, reference)
