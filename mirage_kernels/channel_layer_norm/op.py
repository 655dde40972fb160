"""The public function ``channel_layer_norm`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.library import Implementations, accumulator, define
from mirage_kernels.channel_layer_norm.cases import CASES
from mirage_kernels.channel_layer_norm.reference import channel_layer_norm as reference
from mirage_kernels.tri_branch_fusion.dtypes import widest

_implementations = Implementations(__package__)


def channel_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    r"""LayerNorm over the channels at each pixel, without permuting to channels last.

    .. math:: y_{bchw} = \frac{x_{bchw} - \mu_{bhw}}{\sqrt{\sigma^2_{bhw} + \epsilon}} w_c + b_c

    with mean :math:`\mu` and biased variance :math:`\sigma^2` over c: the ``norm1`` and ``norm2`` of a MIRAGE block.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides.
        weight: [C], the scale. bias: [C], the shift. Their dtype may be wider than that of `x`.
        eps: Added to the variance, in the dtype of the accumulator (float32; float64 for float64).

    Returns:
        [B, C, H, W], contiguous, of the dtype that `x` and `weight` promote to, as in the reference expression.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    checks.check_tensor("x", x, ndim=4)
    for name, value in (("weight", weight), ("bias", bias)):
        checks.check_tensor(name, value, ndim=1)
        checks.check_shape(name, value, (x.shape[1],), "the channels of x")
    checks.check_same_device("x", x, weight=weight, bias=bias)
    checks.check_same_dtype("weight", weight, bias=bias)
    impl = dispatch.choose("channel_layer_norm", widest(x, weight))
    if impl == "torch":
        return reference(x, weight, bias, eps)
    return _forward_op(x, weight, bias, eps, impl)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.record("channel_layer_norm", impl)
    return _implementations[impl].forward(x, weight, bias, eps)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(torch.promote_types(x.dtype, weight.dtype))
    variance, mean = torch.var_mean(x.to(dtype), 1, correction=0)
    return reference(x, weight, bias, eps), mean, (variance + eps).rsqrt()


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    statistics = (x.shape[0], x.shape[2], x.shape[3])
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(statistics, dtype=accumulator(dtype)),
        x.new_empty(statistics, dtype=accumulator(dtype)),
    )


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementations[impl].backward(grad_y, x, weight, mean, rstd)


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, _, ctx.impl = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_mean: None, grad_rstd: None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 5
    x, weight, mean, rstd = ctx.saved_tensors
    return *_backward_op(grad_y, x, weight, mean, rstd, ctx.impl), None, None


_backward_op = define(
    "channel_layer_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd, str impl) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = define(
    "channel_layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps, str impl) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    plain=_plain,
)
register(CASES, channel_layer_norm, reference)
