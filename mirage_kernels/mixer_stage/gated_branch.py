"""The gated CNN branch of ``mixer_stage`` as a chain of steps, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime.library import accumulator
from mirage_kernels.mixer_stage.weights import TAPS, BatchNorm, MixerWeights


class Generator(NamedTuple):
    """The kernel generator's vectors, in the dtype of the accumulator."""

    inputs: Tensor  # [B, c]: the mean over the pixels of the batch norm's output
    average: Tensor  # [B, c]: that of the detail channels
    inner: Tensor  # [B, c]: before the GELU
    kernels: Tensor  # [B, c, 49]


class Maps(NamedTuple):
    """What backward reads again, in the dtype of x; c channels unless stated."""

    normal: Tensor  # the output of the batch norm
    gate: Tensor  # h channels: the gate over its temperature, before the GELU
    content: Tensor  # h channels: identity, and detail after the generated kernels
    detail: Tensor  # before them
    total: Tensor  # the input of proj_out


def statistics(x: Tensor, w: MixerWeights, training: bool) -> BatchNorm:
    variance, mean = torch.var_mean(x.to(accumulator(x.dtype)), (2, 3), correction=0)
    if not training:
        return BatchNorm(mean, *(t.to(mean.dtype, copy=True) for t in (w.bn_mean, w.bn_var)))
    batch_mean = mean.mean(0)  # samples have the same number of pixels
    return BatchNorm(mean, batch_mean, variance.mean(0) + (mean - batch_mean).square().mean(0))


def generate(w: MixerWeights, bn: BatchNorm, eps: float) -> Generator:
    """The kernels of each sample. The average passes through batch norm and gic1 as any pixel does."""
    dtype = bn.branch_mean.dtype
    branch = w.bn_weight.shape[0]
    inputs = bn.normalise(bn.branch_mean, eps) * w.bn_weight.to(dtype) + w.bn_bias.to(dtype)
    average = F.linear(inputs, w.gic1[-branch:].flatten(1).to(dtype))
    inner = F.linear(average, w.generator_in.flatten(1).to(dtype))
    kernels = F.linear(F.gelu(inner), w.generator_out.flatten(1).to(dtype))
    return Generator(inputs, average, inner, kernels.view(-1, branch, TAPS))


def generate_backward(
    grad_kernels: Tensor, w: MixerWeights, bn: BatchNorm, eps: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Gradients of the inputs [B, c], of the rows of gic1 that make the detail, and of the generator's two weights."""
    g = generate(w, bn, eps)
    dtype = g.inputs.dtype
    grad_kernels = grad_kernels.to(dtype).flatten(1)
    grad_out = grad_kernels.mT @ F.gelu(g.inner)
    grad_inner = torch.ops.aten.gelu_backward(grad_kernels @ w.generator_out.flatten(1).to(dtype), g.inner)
    grad_average = grad_inner @ w.generator_in.flatten(1).to(dtype)
    grad_inputs = grad_average @ w.gic1[-w.bn_weight.shape[0] :].flatten(1).to(dtype)
    grads = {"generator_in": grad_inner.mT @ g.average, "generator_out": grad_out}
    return grad_inputs, grad_average.mT @ g.inputs, grads


def forward(
    x: Tensor, w: MixerWeights, branch_scale: Tensor, bn: BatchNorm, kernels: Tensor, eps: float, impl: str
) -> tuple[Tensor, Maps]:
    """The branch [B, c, H, W] from its input x of that shape and the generated kernels [B, c, 49].

    `branch_scale` is [B, 1, 1, 1] in the dtype of the accumulator.
    """
    hidden, branch = w.gic2.shape[1], x.shape[1]
    normal = F.batch_norm(
        x, bn.batch_mean, bn.batch_var, w.bn_weight.to(bn.batch_var), w.bn_bias.to(bn.batch_var), False, 0.0, eps
    )
    gate, identity, detail = _composite.pointwise_conv(normal, w.gic1).split((hidden, hidden - branch, branch), 1)
    gate = gate / _scalar(w.gate_temperature, bn)
    content = torch.cat((identity, _composite.depthwise(detail, _square(kernels), impl)), 1)
    mixed = _composite.pointwise_conv(F.gelu(gate).mul_(content), w.gic2)
    total = (mixed * branch_scale).add_(x).to(x.dtype)
    return _composite.pointwise_conv(total, w.proj_out), Maps(normal, gate, content, detail, total)


def backward(
    grad_y: Tensor,
    x: Tensor,
    w: MixerWeights,
    maps: Maps,
    branch_scale: Tensor,
    bn: BatchNorm,
    kernels: Tensor,
    training: bool,
    eps: float,
    impl: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of x and of the branch's weights by name."""
    grads = {}
    branch = x.shape[1]
    grad_total, grads["proj_out"] = _composite.pointwise_conv_backward(grad_y, maps.total, w.proj_out)
    gate = F.gelu(maps.gate)
    grad_product, grads["gic2"] = _composite.pointwise_conv_backward(
        (grad_total * branch_scale).to(x.dtype), gate * maps.content, w.gic2
    )
    grad_gate = torch.ops.aten.gelu_backward(grad_product * maps.content, maps.gate)
    temperature = _scalar(w.gate_temperature, bn)
    grads["gate_temperature"] = -(grad_gate * maps.gate).sum(dtype=temperature.dtype) / temperature
    grad_content = grad_product.mul_(gate)
    del grad_product, gate
    grad_detail, grad_kernels = _composite.depthwise_backward(
        grad_content[:, -branch:], maps.detail, _square(kernels), impl
    )
    grad_inputs, grad_rows, of_generator = generate_backward(grad_kernels, w, bn, eps)
    grads.update(of_generator)
    expanded = torch.cat((grad_gate / temperature, grad_content[:, :-branch], grad_detail), 1)
    del grad_gate, grad_content, grad_detail
    grad_normal, grads["gic1"] = _composite.pointwise_conv_backward(expanded, maps.normal, w.gic1)
    del expanded
    grads["gic1"] = grads["gic1"].flatten(1).to(grad_rows.dtype)
    grads["gic1"][-branch:] += grad_rows
    grad_x, grads["bn_weight"], grads["bn_bias"] = _batch_norm_backward(
        grad_normal, grad_inputs, x, w, bn, training, eps
    )
    return grad_x.add_(grad_total), grads


def _batch_norm_backward(
    grad_y: Tensor, grad_mean: Tensor, x: Tensor, w: MixerWeights, bn: BatchNorm, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in the dtype of the accumulator; in training also through the statistics.

    `grad_mean` [B, c] is the gradient of each sample's mean of the output, which is not part of `grad_y`.
    """
    dtype = bn.batch_mean.dtype
    normal, grad_y = bn.normalise(x.to(dtype), eps), grad_y.to(dtype)
    grad_weight = (grad_y * normal).sum((0, 2, 3)) + (grad_mean * bn.normalise(bn.branch_mean, eps)).sum(0)
    grad_bias = grad_y.sum((0, 2, 3)) + grad_mean.sum(0)
    count = max(x.shape[2] * x.shape[3], 1)
    shared = grad_mean / count
    if training:
        count *= max(x.shape[0], 1)
        shared = shared - grad_bias / count
        grad_y = grad_y - normal.mul_((grad_weight / count).view(1, -1, 1, 1))
    scale = (w.bn_weight.to(dtype) * (bn.batch_var + eps).rsqrt()).view(1, -1, 1, 1)
    return (grad_y + shared[:, :, None, None]).mul_(scale), grad_weight, grad_bias


def _scalar(weight: Tensor, like: BatchNorm) -> Tensor:
    """A weight [1] without a dimension, so that it does not widen the dtype of a map."""
    return weight.to(like.batch_mean.dtype).reshape(())


def _square(kernels: Tensor) -> Tensor:
    return kernels.view(*kernels.shape[:2], 7, 7)
