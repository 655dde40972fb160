"""``mixer_stage`` on the C++ library (csrc/ops/mixer_stage/cpu/forward_kernels.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, dl, native, result
from mirage_kernels.mixer_stage.weights import LEARNED, MixerWeights, Statistics, scale_of, statistics_shapes


def forward(
    x: Tensor, w: MixerWeights, branch_scale: Tensor | None, training: bool, norm_eps: float, bn_eps: float
) -> tuple[Tensor, Statistics]:
    dtype, shapes = accumulator(x.dtype), statistics_shapes(x.shape[0], x.shape[1], w.temperature.shape[0])
    running = (w.bn_mean.to(dtype, copy=True), w.bn_var.to(dtype, copy=True))
    statistics = Statistics(*(torch.empty(shape, dtype=dtype) for shape in shapes[:3]), *running)
    y = result(x.shape, x.dtype)
    weights, scale = [dl(t.contiguous()) for t in w], dl(scale_of(x, branch_scale))
    native().mixer_stage(dl(x), weights, scale, training, norm_eps, bn_eps, [dl(t) for t in statistics], dl(y))
    return y, statistics


def backward(
    grad_y: Tensor,
    x: Tensor,
    w: MixerWeights,
    branch_scale: Tensor | None,
    statistics: Statistics,
    training: bool,
    norm_eps: float,
    bn_eps: float,
) -> tuple[Tensor, ...]:
    dtype = accumulator(x.dtype)
    learned = [getattr(w, name) for name in LEARNED]
    grad_x, grads = result(x.shape, x.dtype), [torch.empty(t.shape, dtype=dtype) for t in learned]
    native().mixer_stage_backward(
        *(dl(grad_y), dl(x), [dl(t.contiguous()) for t in w], dl(scale_of(x, branch_scale))),
        *(training, norm_eps, bn_eps, [dl(t.contiguous()) for t in statistics]),
        *(dl(grad_x), [dl(g) for g in grads]),
    )
    return grad_x, *(g.to(t.dtype) for g, t in zip(grads, learned, strict=True))
