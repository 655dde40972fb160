"""The public functions on regions. They are for inference: no gradients, and no programs are recorded with them."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.library import accumulator
from mirage_kernels.feed_forward_stage import op as feed_forward_op
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights, Form
from mirage_kernels.mixer_stage import op as mixer_op
from mirage_kernels.mixer_stage.weights import MixerWeights
from mirage_kernels.regions import cpp, reference
from mirage_kernels.regions.checks import (
    APPLY_HALO,
    FEED_FORWARD_HALO,
    SUMS_HALO,
    Cuts,
    RegionStatistics,
    Window,
    check_region,
    check_statistics,
    output,
    statistics_of,
    sums_of,
)

DECLINED = {name: f"parts of a map have no kernel in {name}" for name in ("triton", "cuda")}


def _choose(operator: str, x: Tensor) -> str:
    impl = dispatch.choose(operator, x, DECLINED)
    if impl == "cpp" and not hasattr(dispatch.native, "mixer_stage_sums"):
        _tell_of_old_library()
        impl = "torch"
    dispatch.record(operator, impl)
    return impl


@functools.cache
def _tell_of_old_library() -> None:
    warnings.warn(
        "the C++ library was built from older sources, which had no kernels for parts of a map: PyTorch runs these, "
        "several times slower; build it again (make setup)",
        stacklevel=3,
    )


@torch.no_grad()
def mixer_stage_sums(
    x: Tensor, weights: MixerWeights, window: Window, rows: Cuts, columns: Cuts, norm_eps: float = 1e-5
) -> Tensor:
    r"""What :func:`mirage_kernels.mixer_stage` needs to know of a whole map, of each cell of a grid: sums that add up.

    Of q and k, which the attention makes of its third of the normalised channels, and the input u of the gated CNN:

    .. math:: \sum_p q_{ip} k_{jp} \text{ (by head)}, \quad \sum_p q_{ip}^2, \quad \sum_p k_{jp}^2, \quad \sum_p u_{ip}

    Args:
        x: [B, C, h, w], float32, float64, float16 or bfloat16, any strides: a part of a map, with a halo of one pixel
            around the cells where the map goes on. Halo pixels are read, not counted; outside the map are zeros.
        weights: See :class:`mirage_kernels.MixerWeights`.
        window: Where x lies in the map.
        rows, columns: Ascending positions in the map at which the cells begin and end: m + 1 and n + 1 of them for
            m x n cells. ``(0, height)`` and ``(0, width)`` for one cell of the whole map.
        norm_eps: Added to the variance of the layer norm.

    Returns:
        [B, m, n, K], float64, K = c d + 3 c for branches of c = C / 3 channels and d = c / heads.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    mixer_op.check(x, weights)
    down, across = check_region(x, window, rows, columns, SUMS_HALO)
    if _choose("mixer_stage_sums", x) == "cpp":
        return cpp.sums(x, weights, window, down, across, norm_eps)
    return reference.sums(x, weights, window, down, across, norm_eps)


@torch.no_grad()
def mixer_stage_statistics(
    sums: Tensor, pixels: Tensor | float, weights: MixerWeights, dtype: torch.dtype, bn_eps: float = 1e-5
) -> RegionStatistics:
    """The matrices of the attention and the kernels of the gated CNN that follow from sums over `pixels`.

    Args:
        sums: [..., K], float64: of :func:`mixer_stage_sums`, added up over whatever the statistics are to be of.
        pixels: [...], float64, or a number: over how many pixels the sums run.
        weights: See :class:`mirage_kernels.MixerWeights`. The batch norm uses the running statistics among them.
        dtype: Of the maps to which they will be applied.
        bn_eps: Added to the running variance.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    checks.check_tensor("sums", sums)
    if sums.dtype != torch.float64:
        raise TypeError(f"sums: expected float64, got {sums.dtype}")
    places = tuple(sums.shape[:-1])
    checks.check_shape("sums", sums, (*places, sums_of(weights)), "what mixer_stage_sums returns for these weights")
    pixels = torch.as_tensor(pixels, dtype=torch.float64, device=sums.device).expand(places)
    flat, count, acc = sums.reshape(-1, sums.shape[-1]), pixels.reshape(-1), accumulator(dtype)
    run = cpp if _choose("mixer_stage_statistics", sums) == "cpp" else reference
    found = run.statistics(flat, count, weights, acc, bn_eps)
    shapes = statistics_of(weights)
    return RegionStatistics(*(t.reshape(*places, *shape) for t, shape in zip(found, shapes, strict=True)))


@torch.no_grad()
def mixer_stage_apply(
    x: Tensor,
    weights: MixerWeights,
    statistics: RegionStatistics,
    window: Window,
    rows: Cuts,
    columns: Cuts,
    norm_eps: float = 1e-5,
    bn_eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`mirage_kernels.mixer_stage` in eval mode on a part of a map, with statistics that are given.

    With the statistics of the whole map's sums, in every cell, it is a part of what `mixer_stage` returns.

    Args:
        x: [B, C, h, w], float32, float64, float16 or bfloat16, any strides: a part of a map, with a halo of three
        pixels
            around the cells where the map goes on.
        weights: See :class:`mirage_kernels.MixerWeights`.
        statistics: Of each of the m x n cells, [B, m, n, ...]. See :class:`RegionStatistics`.
        window, rows, columns: As of :func:`mixer_stage_sums`.
        norm_eps, bn_eps: Added to the variances.
        out: Where the result goes, instead of a new tensor: memory apart from x, lines without gaps.

    Returns:
        [B, C, rows[-1] - rows[0], columns[-1] - columns[0]]: `out`, or a contiguous tensor of the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    mixer_op.check(x, weights)
    down, across = check_region(x, window, rows, columns, APPLY_HALO)
    check_statistics(x, weights, statistics, (x.shape[0], len(down) - 1, len(across) - 1))
    y = output(x, out, down, across)
    run = cpp if _choose("mixer_stage_apply", x) == "cpp" else reference
    run.apply(x, weights, statistics, window, down, across, norm_eps, bn_eps, y)
    return y


@torch.no_grad()
def feed_forward_stage_region(
    x: Tensor,
    weights: FeedForwardWeights,
    window: Window,
    rows: Cuts,
    columns: Cuts,
    eps: float = 1e-5,
    out: Tensor | None = None,
    *,
    norm: str = "centred",
    activation: str = "gelu",
) -> Tensor:
    """:func:`mirage_kernels.feed_forward_stage` on a part of a map.

    Args:
        x: [B, C, h, w], float32, float64, float16 or bfloat16, any strides: a part of a map, with a halo of one pixel
            around the region where the map goes on.
        weights: See :class:`mirage_kernels.FeedForwardWeights`.
        window: Where x lies in the map.
        rows, columns: Where the region begins and ends in the map; positions in between mean nothing.
        eps: Added to the variance of the norm.
        out: As of :func:`mixer_stage_apply`.
        norm, activation: As of :func:`mirage_kernels.feed_forward_stage`.

    Returns:
        [B, C, rows[-1] - rows[0], columns[-1] - columns[0]]: `out`, or a contiguous tensor of the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    form = Form(eps, norm, activation)
    feed_forward_op.check(x, weights, form)
    if weights.excite is not None:
        raise ValueError("excite: expected None, since a part of a map has no means of all of it")
    down, across = check_region(x, window, rows, columns, FEED_FORWARD_HALO)
    y = output(x, out, down, across)
    run = cpp if _choose("feed_forward_stage_region", x) == "cpp" else reference
    run.feed_forward(x, weights, window, down, across, form, y)
    return y
