"""``feed_forward_stage`` as a chain of steps, forward and backward: what runs where no kernel holds the whole stage."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels import _composite


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float,
    keep_hidden: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(y, hidden); hidden is of shape [0] unless `keep_hidden`. See `mirage_kernels._composite` for `impl`."""
    dtype, x = x.dtype, _composite.working(x, impl)
    with _composite.without_autocast():
        normal, _, _ = _composite.layer_norm(x, norm_weight, norm_bias, eps, impl)
        hidden = _composite.pointwise_conv(normal, project_in)
        del normal
        y = _composite.pointwise_conv(_composite.gate(hidden, dwconv, impl), project_out)
    return y.add_(x).to(dtype).contiguous(), hidden.to(dtype) if keep_hidden else x.new_empty(0, dtype=dtype)


def backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    hidden: Tensor,
    eps: float,
    impl: str,
) -> tuple[Tensor, ...]:
    """The gradients of x and of the five weights, each in its own dtype; a `hidden` of shape [0] is recomputed."""
    dtype, x, grad_y = x.dtype, _composite.working(x, impl), _composite.working(grad_y, impl)
    with _composite.without_autocast():
        normal, mean, rstd = _composite.layer_norm(x, norm_weight, norm_bias, eps, impl)
        if hidden.dim() == 4:
            hidden = _composite.working(hidden, impl)
        else:
            hidden = _composite.pointwise_conv(normal, project_in)
        gated = _composite.gate(hidden, dwconv, impl)
        grad_gated, grad_out = _composite.pointwise_conv_backward(grad_y, gated, project_out)
        del gated
        grad_hidden, grad_dwconv = _composite.gate_backward(grad_gated, hidden, dwconv, impl)
        del grad_gated, hidden
        grad_normal, grad_in = _composite.pointwise_conv_backward(grad_hidden, normal, project_in)
        del grad_hidden, normal
        grad_x, grad_weight, grad_bias = _composite.layer_norm_backward(grad_normal, x, norm_weight, mean, rstd, impl)
    weights = (norm_weight, norm_bias, project_in, dwconv, project_out)
    grads = (grad_weight, grad_bias, grad_in, grad_dwconv, grad_out)
    total = torch.add(grad_x, grad_y).to(dtype).contiguous()
    return total, *map(_composite.of_weight, grads, weights)
