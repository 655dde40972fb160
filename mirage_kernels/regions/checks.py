"""What the implementations of the stages on regions exchange, and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirage_kernels._runtime import checks
from mirage_kernels._runtime.library import accumulator
from mirage_kernels.mixer_stage.weights import TAPS, MixerWeights

Cuts = Sequence[int]
SUMS_HALO, APPLY_HALO, FEED_FORWARD_HALO = 1, 3, 1


class Window(NamedTuple):
    """Where a tensor [B, C, h, w] lies in the map that it is a part of: the map's `height` and `width`, and the `row`
    and `column` in it of the tensor's first pixel."""

    height: int
    width: int
    row: int = 0
    column: int = 0


class RegionStatistics(NamedTuple):
    """What :func:`mixer_stage_apply` needs of more than the pixel's neighbourhood, in the dtype of the accumulator
    (float32; float64 for float64). Both are used linearly: averages of them give averages of results.

    Attributes:
        attention: [..., heads, 2d + 2, d]: the softmax, then q k^T, |q| and |k|, which nothing here reads.
        kernels: [..., c, 49]: the generated 7x7 kernels.
    """

    attention: Tensor
    kernels: Tensor


def sums_of(weights: MixerWeights) -> int:
    """The length of a cell's sums: q k^T of each head, |q|^2, |k|^2, and the gated branch's input."""
    branch = weights.norm_weight.shape[0] // 3
    return branch * (branch // weights.temperature.shape[0]) + 3 * branch


def statistics_of(weights: MixerWeights) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a cell's statistics."""
    branch, heads = weights.norm_weight.shape[0] // 3, weights.temperature.shape[0]
    depth = branch // heads
    return (heads, 2 * depth + 2, depth), (branch, TAPS)


def check_cuts(name: str, cuts: Cuts, size: int) -> list[int]:
    """Ascending positions in a map of that size along the axis."""
    found = [int(position) for position in cuts]
    ascending = all(a < b for a, b in zip(found, found[1:], strict=False))
    if len(found) < 2 or not ascending or found[0] < 0 or found[-1] > size:
        raise ValueError(f"{name}: expected at least two ascending positions from 0 to {size}, got {found}")
    return found


def check_region(x: Tensor, window: Window, rows: Cuts, columns: Cuts, halo: int) -> tuple[list[int], list[int]]:
    """The cuts as lists, once x is known to hold their halo."""
    height, width, row, column = window
    if row < 0 or column < 0 or row + x.shape[2] > height or column + x.shape[3] > width:
        raise ValueError(f"window: expected one that holds x, of shape {list(x.shape)}, got {tuple(window)}")
    found = check_cuts("rows", rows, height), check_cuts("columns", columns, width)
    for name, cuts, size, first, held in (
        ("rows", found[0], height, row, x.shape[2]),
        ("columns", found[1], width, column, x.shape[3]),
    ):
        needed = max(0, cuts[0] - halo), min(size, cuts[-1] + halo)
        if first > needed[0] or first + held < needed[1]:
            raise ValueError(
                f"{name}: expected a region whose halo of {halo} pixels x holds, {needed[0]} to {needed[1]}, "
                f"got x from {first} to {first + held}"
            )
    return found


def check_statistics(x: Tensor, weights: MixerWeights, statistics: RegionStatistics, cells: tuple[int, ...]) -> None:
    dtype = accumulator(x.dtype)
    for name, value, shape in zip(RegionStatistics._fields, statistics, statistics_of(weights), strict=True):
        checks.check_tensor(name, value)
        checks.check_shape(name, value, (*cells, *shape), "samples, rows and columns of cells, and a cell's")
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} for x of {x.dtype}, got {value.dtype}")
        checks.check_same_device("x", x, **{name: value})


def output(x: Tensor, out: Tensor | None, rows: list[int], columns: list[int]) -> Tensor:
    """`out`, or a new tensor of the region's size."""
    shape = (*x.shape[:2], rows[-1] - rows[0], columns[-1] - columns[0])
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    checks.check_tensor("out", out)
    checks.check_shape("out", out, shape)
    checks.check_same_dtype("x", x, out=out)
    checks.check_same_device("x", x, out=out)
    if shape[3] > 1 and out.stride(3) != 1:
        raise ValueError(f"out: expected lines without gaps, got strides {out.stride()}")
    return out
