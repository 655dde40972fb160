"""``mixer_stage`` in CUDA C++: forward in three kernels (csrc/ops/mixer_stage/cuda/shared.h), backward in ten
(csrc/ops/mixer_stage/cuda/backward.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime import cuda_runtime
from mirage_kernels._runtime.library import is_exact, to_dlpack
from mirage_kernels._runtime.weights import empty_gradients, in_own_dtypes
from mirage_kernels.mixer_stage.weights import LEARNED, MixerWeights, Statistics, scale_of, statistics_shapes


def forward_problem(x: Tensor, w: MixerWeights) -> str:
    return _problem("mixer_stage_workspace", x, w)


def backward_problem(x: Tensor, w: MixerWeights) -> str:
    """Float32 ends at fewer channels than forward; and there have to be pixels."""
    return _problem("mixer_stage_backward_workspace", x, w)


def _problem(workspace: str, x: Tensor, w: MixerWeights) -> str:
    near = to_dlpack(cuda_runtime.as_if_near(x))
    return cuda_runtime.problem(x, workspace, near, w.temperature.shape[0], w.gic2.shape[1], not is_exact(x.dtype))


def forward(
    x: Tensor, w: MixerWeights, branch_scale: Tensor | None, training: bool, norm_eps: float, bn_eps: float
) -> tuple[Tensor, Statistics]:
    x = cuda_runtime.near(x)
    library, tf32, heads = cuda_runtime.library(), not is_exact(x.dtype), w.temperature.shape[0]
    with cuda_runtime.on_device_of(x) as stream:
        size = library.mixer_stage_workspace(to_dlpack(x), heads, w.gic2.shape[1], tf32)
        small = {"dtype": torch.float32, "device": x.device}
        shapes = statistics_shapes(x.shape[0], x.shape[1], heads)
        statistics = Statistics(*(torch.empty(shape, **small) for shape in shapes))
        if x.numel() == 0:  # nothing is launched
            statistics.batch_mean.copy_(w.bn_mean), statistics.batch_var.copy_(w.bn_var)
        scale = scale_of(x, branch_scale)
        weights = [to_dlpack(t) for t in cuda_runtime.of_one_dtype(x.dtype, *w)]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        workspace = to_dlpack(cuda_runtime.workspace(size, x))
        options = (training, norm_eps, bn_eps)
        library.mixer_stage(
            *(
                to_dlpack(x),
                weights,
                to_dlpack(scale),
                *options,
                [to_dlpack(t) for t in statistics],
                to_dlpack(y),
                workspace,
                stream,
                tf32,
            )
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
    """The gradients of x and of `LEARNED`, each in its own dtype."""
    grad_y, x = cuda_runtime.near(grad_y), cuda_runtime.near(x)
    library, tf32, heads = cuda_runtime.library(), not is_exact(x.dtype), w.temperature.shape[0]
    with cuda_runtime.on_device_of(x) as stream:
        size = library.mixer_stage_backward_workspace(to_dlpack(x), heads, w.gic2.shape[1], tf32)
        scale, learned = scale_of(x, branch_scale), [getattr(w, name) for name in LEARNED]
        grads = empty_gradients(learned, torch.float32)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        weights = [to_dlpack(t) for t in cuda_runtime.of_one_dtype(x.dtype, *w)]
        workspace, options = to_dlpack(cuda_runtime.workspace(size, x)), (training, norm_eps, bn_eps)
        inputs = (
            to_dlpack(grad_y),
            to_dlpack(x),
            weights,
            to_dlpack(scale),
            *options,
            [to_dlpack(t) for t in statistics],
        )
        library.mixer_stage_backward(*inputs, to_dlpack(grad_x), [to_dlpack(t) for t in grads], workspace, stream, tf32)
    return grad_x, *in_own_dtypes(grads, learned)
