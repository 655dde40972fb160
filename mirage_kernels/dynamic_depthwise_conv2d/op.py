"""The public function ``dynamic_depthwise_conv2d`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, define
from mirage_kernels.dynamic_depthwise_conv2d.cases import CASES, flops
from mirage_kernels.dynamic_depthwise_conv2d.reference import dynamic_depthwise_conv2d as reference

KERNEL_SIZES = (3, 5, 7, 9, 11)
_implementations = Implementations(__package__)


def dynamic_depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    r"""Depthwise convolution with one kernel per sample and channel, zero padding, stride 1.

    .. math:: y_{bcij} = \sum_{p,q} w_{bcpq} \, x_{b,c,i+p-r,j+q-r}, \qquad r = (K - 1) / 2

    with x zero outside its plane: the 7x7 kernels that MIRAGE's gated CNN branch generates for each sample. A static
    depthwise convolution is the same with ``weight.expand(B, C, K, K)``; nothing is copied for it.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides.
        weight: [B, C, K, K] with K one of 3, 5, 7, 9, 11, of the dtype of `x`, any strides.

    Returns:
        [B, C, H, W], contiguous, of the dtype of `x`; sums are held in float32 (float64 for float64). Under autocast
        both arguments are rounded to its dtype, as ``conv2d`` does.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    checks.check_tensor("x", x, ndim=4)
    checks.check_tensor("weight", weight, ndim=4)
    size = weight.shape[-1]
    if size not in KERNEL_SIZES:
        raise ValueError(f"weight: expected a kernel size of 3, 5, 7, 9 or 11, got shape {list(weight.shape)}")
    checks.check_shape("weight", weight, (x.shape[0], x.shape[1], size, size), "a square kernel per plane of x")
    checks.check_same_device("x", x, weight=weight)
    if _rounded(x) != _rounded(weight):
        checks.check_same_dtype("x", x, weight=weight)
    impl = dispatch.choose("dynamic_depthwise_conv2d", x)
    if impl == "torch":
        return reference(x, weight)
    return _forward_op(x, weight, impl)


def _rounded(t: Tensor) -> torch.dtype:
    """The dtype in which autocast hands `t` to a convolution; its own where autocast is off."""
    device = t.device.type
    if t.dtype == torch.float64 or not checks.under_autocast(t):
        return t.dtype
    return torch.get_autocast_dtype(device)


def _forward(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    dispatch.record("dynamic_depthwise_conv2d", impl)
    return _implementations[impl].forward(x, weight)


def _forward_fake(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return _implementations[impl].backward(grad_y, x, weight, want_x, want_weight)


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if want_x else 0), weight.new_empty(weight.shape if want_weight else 0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.impl = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    want_x, want_weight, *_ = ctx.needs_input_grad
    grad_x, grad_weight = _backward_op(grad_y, x, weight, want_x, want_weight, ctx.impl)
    return grad_x if want_x else None, grad_weight if want_weight else None, None


_backward_op = define(
    "dynamic_depthwise_conv2d_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, bool want_x, bool want_weight, str impl) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = define(
    "dynamic_depthwise_conv2d",
    "(Tensor x, Tensor weight, str impl) -> Tensor",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=(0, 1),
    plain=lambda *args: reference(*args[:-1]),
)
register_flops("dynamic_depthwise_conv2d", flops, gradients=lambda grad_y, x, weight, *want: sum(want[:2]))
register(CASES, dynamic_depthwise_conv2d, reference)
