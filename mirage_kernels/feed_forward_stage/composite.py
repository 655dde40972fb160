"""``feed_forward_stage`` as a chain of steps, forward and backward: what runs where no kernel holds the whole stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime.weights import no_gradient
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights, Form


def forward(x: Tensor, w: FeedForwardWeights, form: Form, keep_hidden: bool, impl: str) -> tuple[Tensor, Tensor]:
    """(y, hidden); hidden is of shape [0] unless `keep_hidden`. See `mirage_kernels._composite` for `impl`."""
    dtype, x = x.dtype, _composite.working(x, impl)
    with _composite.without_autocast():
        normal, _, _ = _composite.layer_norm(x, w.norm_weight, w.norm_bias, form.eps, impl, form.norm)
        hidden = _composite.pointwise_conv(normal, w.project_in, w.project_in_bias)
        del normal
        gated = _gate(hidden, w, form, impl)
        if w.excite is not None:
            gated = gated * _scales(gated, w)[1]
        y = _composite.pointwise_conv(gated, w.project_out, w.project_out_bias)
    return y.add_(x).to(dtype).contiguous(), hidden.to(dtype) if keep_hidden else x.new_empty(0, dtype=dtype)


def backward(
    grad_y: Tensor, x: Tensor, w: FeedForwardWeights, hidden: Tensor, form: Form, impl: str
) -> tuple[Tensor, ...]:
    """The gradients of x and of the weights, each in its own dtype; a `hidden` of shape [0] is recomputed."""
    dtype, x, grad_y = x.dtype, _composite.working(x, impl), _composite.working(grad_y, impl)
    with _composite.without_autocast():
        normal, mean, rstd = _composite.layer_norm(x, w.norm_weight, w.norm_bias, form.eps, impl, form.norm)
        if hidden.dim() == 4:
            hidden = _composite.working(hidden, impl)
        else:
            hidden = _composite.pointwise_conv(normal, w.project_in, w.project_in_bias)
        gated = _gate(hidden, w, form, impl)
        grad_gated, grad_out, of_excitation = _out_backward(grad_y, gated, w)
        del gated
        grad_hidden, grad_dwconv, grad_dwconv_bias = _gate_backward(grad_gated, hidden, w, form, impl)
        del grad_gated, hidden
        grad_normal, grad_in = _composite.pointwise_conv_backward(grad_hidden, normal, w.project_in)
        grad_in_bias = _sums(grad_hidden, w.project_in_bias)
        del grad_hidden, normal
        grad_x, grad_weight, grad_bias = _composite.layer_norm_backward(
            grad_normal, x, w.norm_weight, mean, rstd, impl, form.norm
        )
    convolutions = (grad_in, grad_dwconv, grad_out, grad_in_bias, grad_dwconv_bias, _sums(grad_y, w.project_out_bias))
    grads = (grad_weight, grad_bias, *convolutions, *of_excitation)
    total = torch.add(grad_x, grad_y).to(dtype).contiguous()
    return total, *(
        no_gradient(x) if grad is None or weight is None else _composite.of_weight(grad, weight)
        for grad, weight in zip(grads, w, strict=True)
    )


def _sums(grad: Tensor, bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias that is there."""
    return None if bias is None else grad.sum((0, 2, 3))


def _scales(gated: Tensor, w: FeedForwardWeights) -> tuple[Tensor, Tensor]:
    """The means of the gated channels, and what these are multiplied by: [B, M, 1, 1] each."""
    assert w.excite is not None
    means = gated.mean((2, 3), keepdim=True)
    return means, _composite.pointwise_conv(means, w.excite, w.excite_bias)


def _out_backward(
    grad_y: Tensor, gated: Tensor, w: FeedForwardWeights
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Gradients of the gated channels, of project_out, and of the excitation's weights."""
    if w.excite is None:
        return *_composite.pointwise_conv_backward(grad_y, gated, w.project_out), (None, None)
    means, scales = _scales(gated, w)
    grad, grad_out = _composite.pointwise_conv_backward(grad_y, gated * scales, w.project_out)
    of_scales = (grad * gated).sum((2, 3), keepdim=True)
    of_means, of_excite = _composite.pointwise_conv_backward(of_scales, means, w.excite)
    grad = grad.mul_(scales).add_(of_means / (grad.shape[2] * grad.shape[3]))
    return grad, grad_out, (of_excite, _sums(of_scales, w.excite_bias))


def _has_operators(w: FeedForwardWeights, form: Form) -> bool:
    """Whether the gate is MIRAGE's."""
    return form.activation == form.gate == "gelu" and w.dwconv is not None and w.dwconv_bias is None


def _halves(activated: Tensor, w: FeedForwardWeights) -> tuple[Tensor, Tensor]:
    if w.dwconv is None:
        first, second = activated.chunk(2, 1)
        return first, second
    bias = None if w.dwconv_bias is None else w.dwconv_bias.to(activated.dtype)
    first, second = F.conv2d(
        activated, w.dwconv.to(activated.dtype), bias, padding=1, groups=activated.shape[1]
    ).chunk(2, 1)
    return first, second


def _gate(hidden: Tensor, w: FeedForwardWeights, form: Form, impl: str) -> Tensor:
    if _has_operators(w, form):
        assert w.dwconv is not None
        return _composite.gate(hidden, w.dwconv, impl)
    first, second = _halves(F.gelu(hidden) if form.activation == "gelu" else hidden, w)
    return F.gelu(first).mul_(second) if form.gate == "gelu" else first * second


def _gate_backward(
    grad_y: Tensor, hidden: Tensor, w: FeedForwardWeights, form: Form, impl: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the hidden tensor, the depthwise weight and its bias."""
    if _has_operators(w, form):
        assert w.dwconv is not None
        return *_composite.gate_backward(grad_y, hidden, w.dwconv, impl), None
    activated = F.gelu(hidden) if form.activation == "gelu" else hidden
    first, second = _halves(activated, w)
    if form.gate == "gelu":
        grad_first = torch.ops.aten.gelu_backward(grad_y * second, first)
        grad_second = F.gelu(first).mul_(grad_y)
    else:
        grad_first, grad_second = grad_y * second, grad_y * first
    grad = grad_hidden = torch.cat((grad_first, grad_second), 1)
    grad_dwconv = None
    if w.dwconv is not None:
        grad_hidden, grad_dwconv = _composite.convolution_backward(
            grad, activated, w.dwconv.to(hidden.dtype), padding=1, groups=hidden.shape[1]
        )
    if form.activation == "gelu":
        grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, hidden)
    return grad_hidden, grad_dwconv, _sums(grad, w.dwconv_bias)
