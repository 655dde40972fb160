"""``mixer_stage`` on the C++ library (csrc/ops/mixer_stage/cpu/forward_kernels.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import accumulator, native, result, to_dlpack
from mirage_kernels._runtime.weights import capsules, empty_gradients, in_own_dtypes
from mirage_kernels.mixer_stage.weights import LEARNED, MixerWeights, Statistics, scale_of, statistics_shapes


def forward(
    x: Tensor, w: MixerWeights, branch_scale: Tensor | None, training: bool, norm_eps: float, bn_eps: float
) -> tuple[Tensor, Statistics]:
    dtype, shapes = accumulator(x.dtype), statistics_shapes(x.shape[0], x.shape[1], w.temperature.shape[0])
    running = (w.bn_mean.to(dtype, copy=True), w.bn_var.to(dtype, copy=True))
    statistics = Statistics(*(torch.empty(shape, dtype=dtype) for shape in shapes[:3]), *running)
    y = result(x.shape, x.dtype)
    weights, scale = capsules(w), to_dlpack(scale_of(x, branch_scale))
    native().mixer_stage(
        to_dlpack(x), weights, scale, training, norm_eps, bn_eps, list(map(to_dlpack, statistics)), to_dlpack(y)
    )
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
    learned = [getattr(w, name) for name in LEARNED]
    grad_x, grads = result(x.shape, x.dtype), empty_gradients(learned, accumulator(x.dtype))
    native().mixer_stage_backward(
        *(to_dlpack(grad_y), to_dlpack(x), capsules(w), to_dlpack(scale_of(x, branch_scale))),
        *(training, norm_eps, bn_eps, capsules(statistics), to_dlpack(grad_x), capsules(grads)),
    )
    return grad_x, *in_own_dtypes(grads, learned)
