"""``mixer_stage`` in plain PyTorch: the definition, and what runs under ``use("torch")``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels._runtime.library import accumulator
from mirage_kernels.channel_attention.reference import channel_attention
from mirage_kernels.channel_layer_norm.reference import channel_layer_norm
from mirage_kernels.dynamic_depthwise_conv2d.reference import dynamic_depthwise_conv2d
from mirage_kernels.mixer_stage.weights import MixerWeights
from mirage_kernels.tri_branch_fusion.reference import tri_branch_fusion


class MixerOutput(NamedTuple):
    """The result [B, C, H, W], and the statistics that the batch norm used: mean and biased variance, [c]."""

    y: Tensor
    batch_mean: Tensor
    batch_var: Tensor


def mixer_stage(
    x: Tensor,
    weights: MixerWeights,
    branch_scale: Tensor | None = None,
    training: bool = False,
    norm_eps: float = 1e-5,
    bn_eps: float = 1e-5,
) -> MixerOutput:
    w, heads = weights, weights.temperature.numel()
    normal = channel_layer_norm(x, w.norm_weight, w.norm_bias, norm_eps)
    x_att, x_conv, x_mlp = normal.chunk(3, 1)
    # PyTorch's batch norm is less accurate on a strided slice, and its mean shifts every generated kernel.
    x_conv = x_conv.contiguous()
    qkv = F.conv2d(F.conv2d(x_att, w.qkv), w.qkv_dwconv, padding=1, groups=w.qkv_dwconv.shape[0])
    att = channel_attention(*qkv.chunk(3, 1), w.temperature, heads)
    conv = gated_branch(x_conv, w, branch_scale, training, bn_eps)
    mlp = F.conv1d(F.gelu(F.conv1d(x_mlp.flatten(2), w.mlp_in)), w.mlp_out).reshape(x_mlp.shape)
    y = x + F.conv2d(tri_branch_fusion(att, conv, mlp, w.alpha_att, w.alpha_conv, w.alpha_mlp), w.project_out)
    return MixerOutput(y, *_statistics(x_conv.detach(), w, training))


def gated_branch(x: Tensor, w: MixerWeights, branch_scale: Tensor | None, training: bool, bn_eps: float) -> Tensor:
    """The gated CNN, whose 7x7 kernels are generated from the average of each sample."""
    batch, branch = x.shape[:2]
    running = (None, None) if training else (w.bn_mean.detach(), w.bn_var.detach())
    scaled = F.batch_norm(x, *running, w.bn_weight, w.bn_bias, training, 0.0, bn_eps)
    hidden = w.gic2.shape[1]
    gate, identity, detail = F.conv2d(scaled, w.gic1).split((hidden, hidden - branch, branch), 1)
    average = detail.mean((2, 3), keepdim=True)
    kernels = F.conv2d(F.gelu(F.conv2d(average, w.generator_in)), w.generator_out)
    detail = dynamic_depthwise_conv2d(detail, kernels.reshape(batch, branch, 7, 7))
    mixed = F.conv2d(F.gelu(gate / w.gate_temperature) * torch.cat((identity, detail), 1), w.gic2)
    if branch_scale is not None:
        mixed = mixed * branch_scale.view(-1, 1, 1, 1)
    return F.conv2d(mixed + x, w.proj_out)


def _statistics(x: Tensor, w: MixerWeights, training: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    if not training:
        return w.bn_mean.to(dtype, copy=True), w.bn_var.to(dtype, copy=True)
    variance, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
    return mean, variance
