"""``mixer_stage`` in CUDA C++ (csrc/cuda/mixer_stage.h): forward in three kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels import _cuda_runtime
from mirage_kernels._library import dl, is_exact
from mirage_kernels.mixer_stage.composite import Statistics
from mirage_kernels.mixer_stage.weights import MixerWeights, statistics_shapes


def forward(
    x: Tensor, w: MixerWeights, branch_scale: Tensor | None, training: bool, norm_eps: float, bn_eps: float
) -> tuple[Tensor, Statistics] | None:
    """None where no kernels take so many channels, or the GPU has not the shared memory for them."""
    library, tf32, heads = _cuda_runtime.library(), not is_exact(x.dtype), w.temperature.shape[0]
    with _cuda_runtime.on_device_of(x) as stream:
        size = library.mixer_stage_workspace(dl(x), heads, w.gic2.shape[1], tf32)
        if size is None:
            return None
        small = {"dtype": torch.float32, "device": x.device}
        shapes = statistics_shapes(x.shape[0], x.shape[1], heads)
        statistics = Statistics(*(torch.empty(shape, **small) for shape in shapes))
        if x.numel() == 0:  # nothing is launched
            statistics.batch_mean.copy_(w.bn_mean), statistics.batch_var.copy_(w.bn_var)
        scale = torch.ones(x.shape[0], **small) if branch_scale is None else branch_scale.float().contiguous()
        weights = [dl(t) for t in _cuda_runtime.of_one_dtype(x.dtype, *w)]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        workspace = dl(_cuda_runtime.workspace(size, x))
        options = (training, norm_eps, bn_eps)
        library.mixer_stage(
            *(dl(x), weights, dl(scale), *options, [dl(t) for t in statistics], dl(y), workspace, stream, tf32)
        )
    return y, statistics
