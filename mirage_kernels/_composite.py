"""What the stages of a block share: layouts, and the steps that their composites are made of.

A composite computes a stage as a chain of steps, and its gradient from formulas, so that nothing but the stage's input
and a few small statistics has to live from forward to backward. Its steps are the registered operators of `impl`
("cpp", "triton" or "cuda"), or plain PyTorch where `impl` is "composite". All of it runs inside a registered operator:
below autograd, and with autocast off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels._runtime import transforms
from mirage_kernels._runtime.implementations import KERNELS
from mirage_kernels._runtime.library import accumulator
from mirage_kernels.channel_attention.checks import declined
from mirage_kernels.channel_attention.reference import NORM_EPS
from mirage_kernels.dynamic_depthwise_conv2d.reference import dynamic_depthwise_conv2d as reference_depthwise
from mirage_kernels.tri_branch_fusion.reference import tri_branch_fusion

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, operations keep the dtypes of their arguments, also where a backward runs under autocast."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )
    with torch._C._ExcludeDispatchKeyGuard(keys):
        yield


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x are innermost in memory, and x is not also what ``contiguous()`` means.

    Under transforms of `torch.func` the layout is nobody's: `vmap` does not tell it.
    """
    if transforms.problem():
        return False
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y, which a kernel has written contiguous, in channels_last where the caller's x is: what follows a stage in his
    network is then as fast as he expects."""
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y


def working(x: Tensor, impl: str) -> Tensor:
    """x in the dtype in which a composite computes: 16-bit maps are widened, except on Triton, where the matrix
    products of a GPU are worth rounding between the steps as eager PyTorch does."""
    return x if impl == "triton" else x.to(accumulator(x.dtype))


def of_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """A gradient in the dtype and shape of its weight, contiguous."""
    return grad.reshape(weight.shape).to(weight.dtype).contiguous()


def operator(name: str, impl: str) -> Any:
    """The registered operator `name` where `impl` has one, None for the plain formulas."""
    if impl == "composite":
        return None
    if impl not in KERNELS:
        raise ValueError(f"impl: expected 'cpp', 'triton', 'cuda' or 'composite', got {impl!r}")
    return getattr(torch.ops.mirage_kernels, name).default


# ---- layer norm ----------------------------------------------------------------------------------------------------


def _norm_weights(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Of the dtype of x, or else of the accumulator: what the kernels take."""
    if all(w.dtype == x.dtype for w in weights):
        return list(weights)
    return [w.to(accumulator(x.dtype)) for w in weights]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str, norm: str = "centred"
) -> Triple:
    """The norm over channels in the dtype of x, and the mean and the reciprocal deviation of each pixel.

    `norm`: its kind, one of `mirage_kernels._runtime.norms`. Operators have the centred one with a bias.
    """
    run = operator("channel_layer_norm", impl) if norm == "centred" else None
    if run is not None and bias is None:
        bias = torch.zeros_like(weight)
    if run is not None:
        y, mean, rstd = run(x, *_norm_weights(x, weight, bias), eps, impl)
        return y.to(x.dtype), mean, rstd
    dtype = accumulator(x.dtype)
    values = x.to(dtype)
    variance, mean = torch.var_mean(values, 1, correction=0)
    rstd = (variance + eps).rsqrt()
    scaled = values - mean.unsqueeze(1) if norm == "centred" else values.clone()
    scaled = scaled.mul_(rstd.unsqueeze(1)).mul_(_per_channel(weight, dtype))
    if bias is not None:
        scaled.add_(_per_channel(bias, dtype))
    return scaled.to(x.dtype), mean, rstd


def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, impl: str, norm: str = "centred"
) -> Triple:
    """Gradients of x (in its dtype or the accumulator's), weight and bias."""
    run = operator("channel_layer_norm_backward", impl) if norm == "centred" else None
    if run is not None:
        (scale,) = _norm_weights(x, weight)
        return run(grad_y.to(torch.promote_types(x.dtype, scale.dtype)), x, scale, mean, rstd, impl)
    dtype = accumulator(x.dtype)
    standard = (x.to(dtype) - mean.unsqueeze(1)).mul_(rstd.unsqueeze(1))
    normal = standard if norm == "centred" else x.to(dtype) * rstd.unsqueeze(1)
    grad_y = grad_y.to(dtype)
    grad_weight, grad_bias = (grad_y * normal).sum((0, 2, 3)), grad_y.sum((0, 2, 3))
    grad = grad_y * _per_channel(weight, dtype)
    along = (grad * normal).mean(1, keepdim=True)
    if norm == "centred":
        grad = grad - grad.mean(1, keepdim=True)
    else:  # only the deviation depends on the mean
        normal = standard
    grad_x = grad.sub_(normal.mul_(along)).mul_(rstd.unsqueeze(1))
    return grad_x, grad_weight, grad_bias


def _per_channel(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype).view(1, -1, 1, 1)


# ---- convolutions --------------------------------------------------------------------------------------------------


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution; the weight [N, C, 1, 1] and the bias [N] are rounded to the dtype of x."""
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def pointwise_conv_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> Pair:
    """Gradients of x and weight, in the dtype of x."""
    return convolution_backward(grad_y, x, weight.to(x.dtype), padding=0, groups=1)


def convolution_backward(grad_y: Tensor, x: Tensor, weight: Tensor, padding: int, groups: int) -> Pair:
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


def gate_backward(grad_y: Tensor, h: Tensor, weight: Tensor, impl: str) -> Pair:
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


# ---- depthwise convolutions ----------------------------------------------------------------------------------------


def depthwise(x: Tensor, kernels: Tensor, impl: str) -> Tensor:
    """`dynamic_depthwise_conv2d` of x [B, C, H, W] with kernels [B, C, K, K], rounded to the dtype of x."""
    kernels = kernels.to(x.dtype)
    run = operator("dynamic_depthwise_conv2d", impl)
    return reference_depthwise(x, kernels) if run is None else run(x, kernels, impl)


def depthwise_backward(grad_y: Tensor, x: Tensor, kernels: Tensor, impl: str) -> Pair:
    """Gradients of x and of the kernels [B, C, K, K], in the dtype of x."""
    kernels = kernels.to(x.dtype)
    run = operator("dynamic_depthwise_conv2d_backward", impl)
    if run is not None:
        return run(grad_y, x, kernels, True, True, impl)
    batch, channels, height, width = x.shape
    planes, size = batch * channels, kernels.shape[-1]
    if planes == 0:  # a convolution needs a group
        return torch.zeros_like(x), torch.zeros_like(kernels)
    grad_x, grad_kernels = convolution_backward(
        grad_y.reshape(1, planes, height, width),
        x.reshape(1, planes, height, width),
        kernels.reshape(planes, 1, size, size),
        padding=size // 2,
        groups=planes,
    )
    return grad_x.view(x.shape), grad_kernels.view(kernels.shape)


# ---- attention and fusion ------------------------------------------------------------------------------------------


class Fusion(NamedTuple):
    """What the fusion of the branches reads: three parts of the attention [B, c, H, W], its temperature [heads], the
    other two branches and the weights of the modulations (scalars)."""

    q: Tensor
    k: Tensor
    v: Tensor
    temperature: Tensor
    conv: Tensor
    mlp: Tensor
    alphas: Triple


def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, impl: str) -> Pair:
    """`channel_attention` of q, k and v [B, C, H, W] in their dtype, and the small matrices that its backward takes;
    temperature: [heads], in the dtype of the accumulator."""
    heads = temperature.shape[0]
    run = operator("channel_attention", impl) if _has_kernels(q, heads, impl) else None
    return run(q, k, v, temperature, heads, impl) if run is not None else _attend(q, k, v, temperature)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, matrices: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and temperature."""
    has_kernels = _has_kernels(q, temperature.shape[0], impl)
    run = operator("channel_attention_backward", impl) if has_kernels else None
    if run is not None:
        return run(grad, q, k, v, temperature, matrices, impl)
    return _attend_backward(grad, q, k, v, temperature, matrices)


def fuse(f: Fusion, impl: str) -> Pair:
    """`channel_attention_fusion` in the dtype of q, and the small matrices that its backward takes."""
    heads = f.temperature.shape[0]
    run = operator("channel_attention_fusion", impl) if _has_kernels(f.q, heads, impl) else None
    if run is not None:
        return run(f.q, f.k, f.v, f.temperature, heads, f.conv, f.mlp, *f.alphas, impl)
    att, matrices = _attend(f.q, f.k, f.v, f.temperature)
    return tri_branch_fusion(att, f.conv, f.mlp, *f.alphas), matrices


def fuse_backward(grad_y: Tensor, f: Fusion, matrices: Tensor, impl: str) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, temperature, conv, mlp and the three weights."""
    has_kernels = _has_kernels(f.q, f.temperature.shape[0], impl)
    run = operator("channel_attention_fusion_backward", impl) if has_kernels else None
    if run is not None:
        return run(grad_y, f.q, f.k, f.v, f.temperature, f.conv, f.mlp, *f.alphas, matrices, impl)
    d, v = matrices.shape[-1], _by_head(f.v, f.temperature)
    att = (matrices[:, :, :d].to(v.dtype) @ v).reshape(f.v.shape)
    grad_att, grad_conv, grad_mlp, grad_alphas = _modulation_backward(grad_y, att, f)
    of_attention = _attend_backward(grad_att, f.q, f.k, f.v, f.temperature, matrices)
    return *of_attention, grad_conv, grad_mlp, *grad_alphas


def _has_kernels(q: Tensor, heads: int, impl: str) -> bool:
    return impl not in declined(q, heads)


def _by_head(x: Tensor, temperature: Tensor) -> Tensor:
    """[B, C, H, W] as [B, heads, C / heads, H W]."""
    batch, channels, height, width = x.shape
    heads = temperature.shape[0]
    return x.reshape(batch, heads, channels // heads, height * width)


def _attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Pair:
    sums = [_by_head(t, temperature).to(temperature.dtype) for t in (q, k)]
    gram, norms = sums[0] @ sums[1].mT, [t.square().sum(-1).sqrt() for t in sums]
    attn = (_cosines(gram, *norms) * temperature.view(-1, 1, 1)).softmax(-1)
    matrices = torch.cat((attn, gram, *(n.unsqueeze(2) for n in norms)), 2)
    return (attn.to(v.dtype) @ _by_head(v, temperature)).reshape(v.shape), matrices


def _attend_backward(
    grad_att: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, shape, d = temperature.dtype, q.shape, matrices.shape[-1]
    grad_att, q, k, v = (_by_head(t, temperature) for t in (grad_att, q, k, v))
    attn, gram, (norm_q, norm_k) = matrices[:, :, :d], matrices[:, :, d : 2 * d], matrices[:, :, 2 * d :].unbind(2)
    grad_v = attn.mT.to(v.dtype) @ grad_att
    cosines = _cosines(gram, norm_q, norm_k)
    grad_attn = grad_att.to(dtype) @ v.to(dtype).mT
    grad_scores = attn * (grad_attn - (attn * grad_attn).sum(-1, keepdim=True))
    grad_temperature = (grad_scores * cosines).sum((0, 2, 3))
    grad_cosines = grad_scores * temperature.view(-1, 1, 1)
    through = _cosines(grad_cosines, norm_q, norm_k)
    grad_q = _across(through @ k.to(dtype), q.to(dtype), norm_q)
    grad_k = _across(through.mT @ q.to(dtype), k.to(dtype), norm_k)
    grad_q, grad_k, grad_v = (g.reshape(shape).to(q.dtype) for g in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_temperature


def _cosines(gram: Tensor, norm_q: Tensor, norm_k: Tensor) -> Tensor:
    return gram / norm_q.clamp_min(NORM_EPS).unsqueeze(-1) / norm_k.clamp_min(NORM_EPS).unsqueeze(-2)


def _across(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """A gradient without its part along x, which changes nothing but the norm; all of it where the norm was clamped.
    Of a plane of one pixel that leaves nothing; taken from the small matrices, the rounding of d products would stay.
    """
    along = torch.where(norm < NORM_EPS, 0, (grad * x).sum(-1) / norm.square())
    return grad - along.unsqueeze(-1) * x


def _modulation_backward(grad_y: Tensor, att: Tensor, f: Fusion) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of the three branches and of the three weights of `tri_branch_fusion`."""
    dtype = f.temperature.dtype
    grads = grad_y.chunk(3, 1)
    gates = [torch.sigmoid(a + b) for a, b in ((f.conv, f.mlp), (att, f.mlp), (att, f.conv))]
    grad_alphas = [(g * s).sum(dtype=dtype) for g, s in zip(grads, gates, strict=True)]
    of_conv_mlp, of_att_mlp, of_att_conv = (
        torch.ops.aten.sigmoid_backward(g * a, s) for g, a, s in zip(grads, f.alphas, gates, strict=True)
    )
    return (
        grads[0] + of_att_mlp + of_att_conv,
        grads[1] + of_conv_mlp + of_att_conv,
        grads[2] + of_conv_mlp + of_att_mlp,
        grad_alphas,
    )
