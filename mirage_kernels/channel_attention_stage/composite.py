"""``channel_attention_stage`` as a chain of steps, forward and backward: what runs where no kernel holds the stage."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime.library import accumulator
from mirage_kernels._runtime.weights import in_own_dtypes
from mirage_kernels.channel_attention_stage.weights import ChannelAttentionWeights


def forward(x: Tensor, w: ChannelAttentionWeights, norm: str, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    """y and the matrices that backward takes. See `mirage_kernels._composite` for `impl`."""
    dtype, x = x.dtype, _composite.working(x, impl)
    with _composite.without_autocast():
        normal, _, _ = _composite.layer_norm(x, w.norm_weight, w.norm_bias, eps, impl, norm)
        _, q, k, v = _project(normal, w, impl)
        del normal
        attended, matrices = _composite.attend(q, k, v, _temperature(x, w), impl)
        del q, k, v
        y = _composite.pointwise_conv(attended, w.project_out, w.project_out_bias)
    return y.add_(x).to(dtype).contiguous(), matrices


def backward(
    grad_y: Tensor, x: Tensor, w: ChannelAttentionWeights, matrices: Tensor, norm: str, eps: float, impl: str
) -> tuple[Tensor, ...]:
    """The gradients of x and of the weights, each in its own dtype."""
    dtype, x, grad_y = x.dtype, _composite.working(x, impl), _composite.working(grad_y, impl)
    acc = accumulator(dtype)
    with _composite.without_autocast():
        normal, mean, rstd = _composite.layer_norm(x, w.norm_weight, w.norm_bias, eps, impl, norm)
        projected, q, k, v = _project(normal, w, impl)
        temperature = _temperature(x, w)
        attended, _ = _composite.attend(q, k, v, temperature, impl)
        grad_attended, of_out = _composite.pointwise_conv_backward(grad_y, attended, w.project_out)
        of_out_bias = grad_y.sum((0, 2, 3), dtype=acc)
        del attended
        *of_qkv, of_temperature = _composite.attend_backward(grad_attended, q, k, v, temperature, matrices, impl)
        del grad_attended, q, k, v
        grad_qkv = torch.cat(of_qkv, 1)
        del of_qkv
        of_taps_bias = grad_qkv.sum((0, 2, 3), dtype=acc)
        grad_projected, of_taps = _composite.depthwise_backward(grad_qkv, projected, _taps(x, w), impl)
        of_product_bias = grad_projected.sum((0, 2, 3), dtype=acc)
        del grad_qkv, projected
        grad_normal, of_product = _composite.pointwise_conv_backward(grad_projected, normal, w.qkv)
        del grad_projected, normal
        grad_x, of_weight, of_bias = _composite.layer_norm_backward(
            grad_normal, x, w.norm_weight, mean, rstd, impl, norm
        )
    total = torch.add(grad_x, grad_y).to(dtype).contiguous()
    grads = ChannelAttentionWeights(
        *(of_weight, of_bias, of_product, of_product_bias, of_taps.sum(0, dtype=acc), of_taps_bias),
        *(of_temperature, of_out, of_out_bias),
    )
    shaped = [None if t is None else _composite.of_weight(g, t) for g, t in zip(grads, w, strict=True)]
    return total, *in_own_dtypes(shaped, w)


def _project(normal: Tensor, w: ChannelAttentionWeights, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, 3C, H, W] before the depthwise convolution; q, k and v behind it."""
    projected = _composite.pointwise_conv(normal, w.qkv, w.qkv_bias)
    qkv = _composite.depthwise(projected, _taps(normal, w), impl)
    if w.qkv_dwconv_bias is not None:
        qkv = qkv + w.qkv_dwconv_bias.to(qkv.dtype).view(1, -1, 1, 1)
    q, k, v = qkv.chunk(3, 1)
    return projected, q, k, v


def _taps(x: Tensor, w: ChannelAttentionWeights) -> Tensor:
    """The depthwise weight as one kernel for every sample: [B, 3C, 3, 3], without a copy."""
    return w.qkv_dwconv.to(x.dtype).transpose(0, 1).expand(x.shape[0], -1, -1, -1)


def _temperature(x: Tensor, w: ChannelAttentionWeights) -> Tensor:
    return w.temperature.flatten().to(accumulator(x.dtype))
