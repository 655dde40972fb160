"""What the stages of a block share: which implementation runs, and the steps that their composites are made of.

A composite computes a stage as a chain of steps, and its gradient from formulas, so that nothing but the stage's input
and a few small statistics has to live from forward to backward. Its steps are the registered operators of `impl`
("cpp" or "triton"), or plain PyTorch where `impl` is "composite". All of it runs inside a registered operator: below
autograd, and with autocast off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import _dispatch
from mirage_kernels._library import accumulator

OPERATOR_IMPLEMENTATIONS = ("cpp", "triton")
_Two = tuple[Tensor, Tensor]
_Three = tuple[Tensor, Tensor, Tensor]


def choose(operator: str, x: Tensor) -> str:
    """The implementation for a call of a stage: as `_dispatch.choose`, and "composite" where it falls back on "torch".

    A forced "torch" stays what it is everywhere: the reference expression with PyTorch's own autograd.
    """
    chosen = _dispatch.choose(operator, x)
    return "composite" if chosen == "torch" and _dispatch._forced is None else chosen


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, operations keep the dtypes of their arguments, also where a backward runs under autocast."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )
    with torch._C._ExcludeDispatchKeyGuard(keys):
        yield


def operator(name: str, impl: str) -> Any:
    """The registered operator `name` where `impl` has one, None for the plain formulas."""
    if impl == "composite":
        return None
    if impl not in OPERATOR_IMPLEMENTATIONS:
        raise ValueError(f"impl: expected 'cpp', 'triton' or 'composite', got {impl!r}")
    return getattr(torch.ops.mirage_kernels, name).default


# ---- layer norm ----------------------------------------------------------------------------------------------------


def _norm_weights(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Of the dtype of x, or else of the accumulator: what the kernels take."""
    if all(w.dtype == x.dtype for w in weights):
        return list(weights)
    return [w.to(accumulator(x.dtype)) for w in weights]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str) -> _Three:
    """The norm over channels in the dtype of x, and the mean and the reciprocal deviation of each pixel."""
    run = operator("channel_layer_norm", impl)
    if run is not None:
        y, mean, rstd = run(x, *_norm_weights(x, weight, bias), eps, impl)
        return y.to(x.dtype), mean, rstd
    dtype = accumulator(x.dtype)
    values = x.to(dtype)
    variance, mean = torch.var_mean(values, 1, correction=0)
    rstd = (variance + eps).rsqrt()
    scaled = (values - mean.unsqueeze(1)).mul_(rstd.unsqueeze(1)).mul_(_per_channel(weight, dtype))
    return scaled.add_(_per_channel(bias, dtype)).to(x.dtype), mean, rstd


def layer_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, impl: str) -> _Three:
    """Gradients of x (in its dtype or the accumulator's), weight and bias."""
    run = operator("channel_layer_norm_backward", impl)
    if run is not None:
        (scale,) = _norm_weights(x, weight)
        return run(grad_y.to(torch.promote_types(x.dtype, scale.dtype)), x, scale, mean, rstd, impl)
    dtype = accumulator(x.dtype)
    normal = (x.to(dtype) - mean.unsqueeze(1)).mul_(rstd.unsqueeze(1))
    grad_y = grad_y.to(dtype)
    grad_weight, grad_bias = (grad_y * normal).sum((0, 2, 3)), grad_y.sum((0, 2, 3))
    grad = grad_y * _per_channel(weight, dtype)
    along = (grad * normal).mean(1, keepdim=True)
    grad_x = (grad - grad.mean(1, keepdim=True)).sub_(normal.mul_(along)).mul_(rstd.unsqueeze(1))
    return grad_x, grad_weight, grad_bias


def _per_channel(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype).view(1, -1, 1, 1)


# ---- convolutions --------------------------------------------------------------------------------------------------


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution; the weight [N, C, 1, 1] is rounded to the dtype of x."""
    return F.conv2d(x, weight.to(x.dtype))


def mix_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> _Two:
    """Gradients of x and weight, in the dtype of x."""
    return convolution_backward(grad_y, x, weight.to(x.dtype), padding=0, groups=1)


def convolution_backward(grad_y: Tensor, x: Tensor, weight: Tensor, padding: int, groups: int) -> _Two:
    ones, none = [1, 1], [0, 0]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, ones, [padding, padding], ones, False, none, groups, [True, True, False]
    )
    return grad_x, grad_weight


# ---- gate of the feed-forward network ------------------------------------------------------------------------------


def gate(h: Tensor, weight: Tensor, impl: str) -> Tensor:
    """`gated_depthwise_ffn`; the weight is rounded to the dtype of h."""
    weight = weight.to(h.dtype)
    run = operator("gated_depthwise_ffn", impl)
    if run is not None:
        return run(h, weight, impl)
    first, second = F.conv2d(F.gelu(h), weight, padding=1, groups=h.shape[1]).chunk(2, 1)
    return F.gelu(first).mul_(second)


def gate_backward(grad_y: Tensor, h: Tensor, weight: Tensor, impl: str) -> _Two:
    """Gradients of h and weight, in the dtype of h."""
    weight = weight.to(h.dtype)
    run = operator("gated_depthwise_ffn_backward", impl)
    if run is not None:
        return run(grad_y, h, weight, impl)
    activated = F.gelu(h)
    first, second = F.conv2d(activated, weight, padding=1, groups=h.shape[1]).chunk(2, 1)
    grad_first = torch.ops.aten.gelu_backward(grad_y * second, first)
    grad_second = F.gelu(first).mul_(grad_y)
    grad_activated, grad_weight = convolution_backward(
        torch.cat((grad_first, grad_second), 1), activated, weight, padding=1, groups=h.shape[1]
    )
    return torch.ops.aten.gelu_backward(grad_activated, h), grad_weight
