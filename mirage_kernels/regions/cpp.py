"""Stages on regions on the C++ library: the passes of csrc/ops/{mixer,feed_forward}_stage/cpu/forward_kernels.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels._runtime.library import native, to_dlpack
from mirage_kernels._runtime.weights import capsules
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights, Form
from mirage_kernels.mixer_stage.weights import MixerWeights
from mirage_kernels.regions.checks import RegionStatistics, Window, statistics_of, sums_of


def sums(x: Tensor, w: MixerWeights, window: Window, rows: list[int], columns: list[int], norm_eps: float) -> Tensor:
    found = torch.empty(x.shape[0], len(rows) - 1, len(columns) - 1, sums_of(w), dtype=torch.float64)
    native().mixer_stage_sums(to_dlpack(x), list(window), rows, columns, capsules(w), norm_eps, 0.0, to_dlpack(found))
    return found


def statistics(sums: Tensor, pixels: Tensor, w: MixerWeights, dtype: torch.dtype, bn_eps: float) -> RegionStatistics:
    found = RegionStatistics(*(torch.empty(len(sums), *shape, dtype=dtype) for shape in statistics_of(w)))
    native().mixer_stage_statistics(
        to_dlpack(sums.contiguous()),
        to_dlpack(pixels.contiguous()),
        capsules(w),
        0.0,
        bn_eps,
        *(to_dlpack(t) for t in found),
    )
    return found


def apply(
    x: Tensor,
    w: MixerWeights,
    statistics: RegionStatistics,
    window: Window,
    rows: list[int],
    columns: list[int],
    norm_eps: float,
    bn_eps: float,
    out: Tensor,
) -> None:
    flat = capsules(t.flatten(0, 2) for t in statistics)
    native().mixer_stage_apply(
        to_dlpack(x), list(window), rows, columns, capsules(w), norm_eps, bn_eps, *flat, to_dlpack(out)
    )


def feed_forward(
    x: Tensor, w: FeedForwardWeights, window: Window, rows: list[int], columns: list[int], form: Form, out: Tensor
) -> None:
    native().feed_forward_stage_region(to_dlpack(x), list(window), rows, columns, capsules(w), *form, to_dlpack(out))
