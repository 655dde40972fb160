"""``mixer_stage`` in CUDA C++: forward in three kernels (csrc/ops/mixer_stage/cuda/shared.h), backward in ten
(csrc/ops/mixer_stage/cuda/backward.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import dl, is_exact
from mirage_kernels.mixer_stage.weights import LEARNED, MixerWeights, Statistics, scale_of, statistics_shapes


def forward(
    x: Tensor, w: MixerWeights, branch_scale: Tensor | None, training: bool, norm_eps: float, bn_eps: float
) -> tuple[Tensor, Statistics] | None:
    """None where no kernels take so many channels, or the GPU has not the shared memory for them."""
    x = cuda_runtime.near(x)
    library, tf32, heads = cuda_runtime.library(), not is_exact(x.dtype), w.temperature.shape[0]
    with cuda_runtime.on_device_of(x) as stream:
        size = library.mixer_stage_workspace(dl(x), heads, w.gic2.shape[1], tf32)
        if size is None:
            return None
        small = {"dtype": torch.float32, "device": x.device}
        shapes = statistics_shapes(x.shape[0], x.shape[1], heads)
        statistics = Statistics(*(torch.empty(shape, **small) for shape in shapes))
        if x.numel() == 0:  # nothing is launched
            statistics.batch_mean.copy_(w.bn_mean), statistics.batch_var.copy_(w.bn_var)
        scale = scale_of(x, branch_scale)
        weights = [dl(t) for t in cuda_runtime.of_one_dtype(x.dtype, *w)]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        workspace = dl(cuda_runtime.workspace(size, x))
        options = (training, norm_eps, bn_eps)
        library.mixer_stage(
            *(dl(x), weights, dl(scale), *options, [dl(t) for t in statistics], dl(y), workspace, stream, tf32)
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
) -> tuple[Tensor, ...] | None:
    """The gradients of x and of `LEARNED`, each in its own dtype. None where `forward` has it, in float32 with fewer
    channels than there, and where there are no pixels."""
    grad_y, x = cuda_runtime.near(grad_y), cuda_runtime.near(x)
    library, tf32, heads = cuda_runtime.library(), not is_exact(x.dtype), w.temperature.shape[0]
    with cuda_runtime.on_device_of(x) as stream:
        size = library.mixer_stage_backward_workspace(dl(x), heads, w.gic2.shape[1], tf32)
        if size is None:
            return None
        scale, learned = scale_of(x, branch_scale), [getattr(w, name) for name in LEARNED]
        grads = [torch.empty(t.shape, dtype=torch.float32, device=x.device) for t in learned]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        weights = [dl(t) for t in cuda_runtime.of_one_dtype(x.dtype, *w)]
        workspace, options = dl(cuda_runtime.workspace(size, x)), (training, norm_eps, bn_eps)
        inputs = (dl(grad_y), dl(x), weights, dl(scale), *options, [dl(t) for t in statistics])
        library.mixer_stage_backward(*inputs, dl(grad_x), [dl(t) for t in grads], workspace, stream, tf32)
    return grad_x, *(g.to(t.dtype) for g, t in zip(grads, learned, strict=True))
