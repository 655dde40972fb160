"""``mixer_stage`` as a chain of steps, forward and backward: what runs where no kernel holds the whole stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime.library import accumulator
from mirage_kernels.mixer_stage import gated_branch
from mirage_kernels.mixer_stage.weights import LEARNED, BatchNorm, MixerWeights, Statistics, scale_of


class _Attention(NamedTuple):
    projected: Tensor  # [B, 3c, H, W], before the depthwise convolution
    qkv: Tensor  # [B, 3c, H, W], after it


def forward(
    x: Tensor,
    w: MixerWeights,
    branch_scale: Tensor | None,
    training: bool,
    norm_eps: float,
    bn_eps: float,
    impl: str,
) -> tuple[Tensor, Statistics]:
    """y and the statistics. See `mirage_kernels._composite` for `impl`."""
    dtype, x = x.dtype, _composite.working(x, impl)
    with _composite.without_autocast():
        normal, _, _ = _composite.layer_norm(x, w.norm_weight, w.norm_bias, norm_eps, impl)
        x_att, x_conv, x_mlp = normal.chunk(3, 1)
        x_conv = x_conv.contiguous()
        attention = _project(x_att, w, impl)
        bn = gated_branch.statistics(x_conv, w, training)
        kernels = gated_branch.generate(w, bn, bn_eps).kernels
        scale = scale_of(x, branch_scale).view(-1, 1, 1, 1)
        conv, maps = gated_branch.forward(x_conv, w, scale, bn, kernels, bn_eps, impl)
        del maps, x_conv
        _, mlp = _mlp(x_mlp, w)
        del normal, x_att, x_mlp
        fused, matrices = _composite.fuse(_fusion(attention, conv, mlp, w), impl)
        del attention, conv, mlp
        y = _composite.pointwise_conv(fused, w.project_out)
    return y.add_(x).to(dtype).contiguous(), Statistics(matrices, kernels, *bn)


def backward(
    grad_y: Tensor,
    x: Tensor,
    w: MixerWeights,
    branch_scale: Tensor | None,
    statistics: Statistics,
    training: bool,
    norm_eps: float,
    bn_eps: float,
    impl: str,
) -> tuple[Tensor, ...]:
    """The gradients of x and of `LEARNED`, each in its own dtype."""
    dtype, x, grad_y = x.dtype, _composite.working(x, impl), _composite.working(grad_y, impl)
    grads: dict[str, Tensor] = {}
    with _composite.without_autocast():
        normal, mean, rstd = _composite.layer_norm(x, w.norm_weight, w.norm_bias, norm_eps, impl)
        x_att, x_conv, x_mlp = normal.chunk(3, 1)
        x_conv, scale = x_conv.contiguous(), scale_of(x, branch_scale).view(-1, 1, 1, 1)
        bn = BatchNorm(statistics.branch_mean, statistics.batch_mean, statistics.batch_var)
        attention = _project(x_att, w, impl)
        conv, maps = gated_branch.forward(x_conv, w, scale, bn, statistics.kernels, bn_eps, impl)
        inner, mlp = _mlp(x_mlp, w)
        fusion = _fusion(attention, conv, mlp, w)
        fused, _ = _composite.fuse(fusion, impl)
        grad_fused, grads["project_out"] = _composite.pointwise_conv_backward(grad_y, fused, w.project_out)
        del fused
        grad_q, grad_k, grad_v, grads["temperature"], grad_conv, grad_mlp, *grad_alphas = _composite.fuse_backward(
            grad_fused, fusion, statistics.attention, impl
        )
        grads.update(zip(("alpha_att", "alpha_conv", "alpha_mlp"), grad_alphas, strict=True))
        del grad_fused, fusion, conv, mlp
        grad_qkv = torch.cat((grad_q, grad_k, grad_v), 1)
        del grad_q, grad_k, grad_v
        grad_att, of_attention = _project_backward(grad_qkv, x_att, w, attention, impl)
        del grad_qkv, attention
        grad_x_mlp, of_mlp = _mlp_backward(grad_mlp, x_mlp, w, inner)
        grad_x_conv, of_branch = gated_branch.backward(
            grad_conv, x_conv, w, maps, scale, bn, statistics.kernels, training, bn_eps, impl
        )
        grads |= of_attention | of_mlp | of_branch
        del maps, normal, x_att, x_conv, x_mlp
        grad_normal = torch.cat([g.to(x.dtype) for g in (grad_att, grad_x_conv, grad_x_mlp)], 1)
        grad_x, grads["norm_weight"], grads["norm_bias"] = _composite.layer_norm_backward(
            grad_normal, x, w.norm_weight, mean, rstd, impl
        )
    total = torch.add(grad_x, grad_y).to(dtype).contiguous()
    return total, *(_composite.of_weight(grads[name], getattr(w, name)) for name in LEARNED)


def _project(x: Tensor, w: MixerWeights, impl: str) -> _Attention:
    projected = _composite.pointwise_conv(x, w.qkv)
    return _Attention(projected, _composite.depthwise(projected, _static(projected, w.qkv_dwconv), impl))


def _project_backward(
    grad_qkv: Tensor, x: Tensor, w: MixerWeights, attention: _Attention, impl: str
) -> tuple[Tensor, dict[str, Tensor]]:
    kernels = _static(attention.projected, w.qkv_dwconv)
    grad_projected, of_samples = _composite.depthwise_backward(grad_qkv, attention.projected, kernels, impl)
    grad_x, grad_qkv_weight = _composite.pointwise_conv_backward(grad_projected, x, w.qkv)
    return grad_x, {"qkv": grad_qkv_weight, "qkv_dwconv": of_samples.sum(0, dtype=accumulator(x.dtype))}


def _static(x: Tensor, weight: Tensor) -> Tensor:
    """A depthwise weight [N, 1, K, K] as one kernel for every sample of x: [B, N, K, K], without a copy."""
    return weight.to(x.dtype).transpose(0, 1).expand(x.shape[0], -1, -1, -1)


def _mlp(x: Tensor, w: MixerWeights) -> tuple[Tensor, Tensor]:
    """[B, 2c, H, W] before the GELU, and the branch."""
    inner = _composite.pointwise_conv(x, w.mlp_in.unsqueeze(-1))
    return inner, _composite.pointwise_conv(F.gelu(inner), w.mlp_out.unsqueeze(-1))


def _mlp_backward(grad_y: Tensor, x: Tensor, w: MixerWeights, inner: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    grad_inner, grad_out = _composite.pointwise_conv_backward(grad_y, F.gelu(inner), w.mlp_out.unsqueeze(-1))
    grad_in = torch.ops.aten.gelu_backward(grad_inner, inner)
    grad_x, grad_in = _composite.pointwise_conv_backward(grad_in, x, w.mlp_in.unsqueeze(-1))
    return grad_x, {"mlp_in": grad_in, "mlp_out": grad_out}


def _fusion(attention: _Attention, conv: Tensor, mlp: Tensor, w: MixerWeights) -> _composite.Fusion:
    dtype = accumulator(conv.dtype)
    alphas = (w.alpha_att, w.alpha_conv, w.alpha_mlp)
    temperature, *scalars = (t.to(dtype) for t in (w.temperature.flatten(), *alphas))
    return _composite.Fusion(*attention.qkv.chunk(3, 1), temperature, conv, mlp, tuple(s.reshape(()) for s in scalars))
