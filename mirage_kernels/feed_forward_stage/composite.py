"""``feed_forward_stage`` as a chain of steps, forward and backward: what runs where no kernel holds the whole stage."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels import _stage


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
    """(y, hidden); hidden is of shape [0] unless `keep_hidden`. See `mirage_kernels._stage` for `impl`."""
    dtype, x = x.dtype, _stage.working(x, impl)
    with _stage.without_autocast():
        normal, _, _ = _stage.layer_norm(x, norm_weight, norm_bias, eps, impl)
        hidden = _stage.mix(normal, project_in)
        del normal
        y = _stage.mix(_stage.gate(hidden, dwconv, impl), project_out)
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
    dtype, x, grad_y = x.dtype, _stage.working(x, impl), _stage.working(grad_y, impl)
    with _stage.without_autocast():
        normal, mean, rstd = _stage.layer_norm(x, norm_weight, norm_bias, eps, impl)
        hidden = _stage.working(hidden, impl) if hidden.dim() == 4 else _stage.mix(normal, project_in)
        gated = _stage.gate(hidden, dwconv, impl)
        grad_gated, grad_out = _stage.mix_backward(grad_y, gated, project_out)
        del gated
        grad_hidden, grad_dwconv = _stage.gate_backward(grad_gated, hidden, dwconv, impl)
        del grad_gated, hidden
        grad_normal, grad_in = _stage.mix_backward(grad_hidden, normal, project_in)
        del grad_hidden, normal
        grad_x, grad_weight, grad_bias = _stage.layer_norm_backward(grad_normal, x, norm_weight, mean, rstd, impl)
    weights = (norm_weight, norm_bias, project_in, dwconv, project_out)
    grads = (grad_weight, grad_bias, grad_in, grad_dwconv, grad_out)
    total = torch.add(grad_x, grad_y).to(dtype).contiguous()
    return total, *(g.to(w.dtype).contiguous() for g, w in zip(grads, weights, strict=True))
