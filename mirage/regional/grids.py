"""Where the statistics of a block's mixer come from: the whole map, or windows of it.

Windows follow the test-time local converter (TLC, Chu et al., ECCV 2022) as Restormer uses it: along each axis the
fewest windows that cover the map at the overlap that is asked for, at equal steps, the last of them ending with the
map. All edges of windows together cut the map into cells. A window's sums are those of its cells, which are summed
once, and nothing is unfolded.

What lies in several windows is the average of what each of them gives. Attention times v and the generated convolution
are linear in the matrices and kernels, so the average of those gives the average of the results.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_kernels import MixerWeights
from mirage_kernels.regions import RegionStatistics, mixer_stage_statistics

__all__ = ["Axis", "Grid"]


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: the `cuts` between cells, and of each window the cells [first, stop) that it is made of."""

    cuts: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, size: int, window: int | None, overlap: float = 0.0) -> Axis:
        """Windows of `window` pixels over `size`; one of all where it is None or not smaller. `overlap`: the least
        part of a window that it shares with the next."""
        if window is None or window >= size:
            return cls((0, size), ((0, 1),))
        count = math.ceil((size - window) / max(1, window * (1 - overlap)) - 1e-9) + 1
        step = math.ceil((size - window) / (count - 1) - 1e-8)
        starts = sorted({min(i * step, size - window) for i in range(count)})
        cuts = sorted({0, size, *starts, *(start + window for start in starts)})
        return cls(tuple(cuts), tuple((cuts.index(start), cuts.index(start + window)) for start in starts))

    @property
    def cells(self) -> int:
        return len(self.cuts) - 1

    def between(self, first: int, stop: int) -> tuple[int, list[int]]:
        """The cell in which `first` lies, and the cuts from `first` to `stop`."""
        cell = bisect_right(self.cuts, first) - 1
        end = bisect_right(self.cuts, stop - 1)
        return cell, [first, *self.cuts[cell + 1 : end], stop]

    def sums_of_windows(self, cells: Tensor) -> Tensor:
        """[cells, ...] to [windows, ...]. Sums of slices, not differences of sums: what is not finite in one window
        stays there."""
        return torch.stack([cells[first:stop].sum(0) for first, stop in self.windows])

    def averages_of_cells(self, windows: Tensor) -> Tensor:
        """[windows, ...] to [cells, ...]: the mean over the windows that a cell lies in."""
        covering = ([i for i, (a, b) in enumerate(self.windows) if a <= cell < b] for cell in range(self.cells))
        return torch.stack([windows[i[0] : i[-1] + 1].mean(0) if len(i) > 1 else windows[i[0]] for i in covering])

    def window_pixels(self) -> Tensor:
        return torch.tensor([self.cuts[b] - self.cuts[a] for a, b in self.windows], dtype=torch.float64)


@dataclass(frozen=True)
class Grid:
    """The cells of a map of `rows.cuts[-1]` x `columns.cuts[-1]` pixels."""

    rows: Axis
    columns: Axis

    def statistics(self, sums: Tensor, weights: MixerWeights, dtype: torch.dtype, bn_eps: float) -> RegionStatistics:
        """Statistics [1, rows, columns, ...] of the cells from their sums [rows, columns, K], float64."""
        of_windows = self.columns.sums_of_windows(self.rows.sums_of_windows(sums).transpose(0, 1)).transpose(0, 1)
        pixels = torch.outer(self.rows.window_pixels(), self.columns.window_pixels()).to(sums.device)
        found = mixer_stage_statistics(of_windows, pixels, weights, dtype, bn_eps)

        def average(windows: Tensor) -> Tensor:
            down = self.rows.averages_of_cells(windows).transpose(0, 1)
            return self.columns.averages_of_cells(down).transpose(0, 1).unsqueeze(0)

        return RegionStatistics(*(average(t) for t in found))
