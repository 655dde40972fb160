"""Rows of a feature map on their way from one operation to the next, and the operations.

Rows come from above. An operation with a halo of h pixels makes a row once h more rows have come, or the map has
ended, and its last 2 h rows of input stay until then. So nothing is computed twice, and a result never needs more of
its input than a few rows beyond the strip.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import mirage_kernels
from mirage.regional.grids import Grid
from mirage.regional.network import Block
from mirage.regional.storage import FeatureMap
from mirage_kernels import MixerWeights, regions
from mirage_kernels.regions import RegionStatistics, Window

__all__ = [
    "AddImage",
    "Convolution",
    "Downsampling",
    "FeedForward",
    "Joining",
    "Lines",
    "Mixer",
    "Operation",
    "Storing",
    "Summing",
    "Upsampling",
]


class Lines:
    """Some consecutive rows of a map [channels, height, width]: those that have come and are still needed.

    Args:
        most: the most rows that come at once.
    """

    def __init__(self, channels: int, height: int, width: int, most: int) -> None:
        self.channels, self.height, self.width, self.most = channels, height, width, min(most, height)
        self.users: list[Operation] = []
        self.first = self.stop = 0
        self._buffer = torch.empty(0)

    @property
    def capacity(self) -> int:
        return min(self.height, self.most + max((2 * user.halo + user.step - 1 for user in self.users), default=0))

    @property
    def elements(self) -> int:
        return self.channels * self.capacity * self.width

    def take(self, memory: Tensor) -> None:
        """Hold rows in `memory`, of :attr:`elements`."""
        self._buffer = memory.view(1, self.channels, self.capacity, self.width)

    def release(self) -> None:
        """Forget rows and users, which know these lines too: so the memory is free at once."""
        self._buffer = torch.empty(0)
        self.users.clear()

    def come(self, count: int) -> Tensor:
        """Where the next `count` rows go, [1, channels, count, width]: to be filled at once."""
        if self.stop + count - self.first > self._buffer.shape[2]:
            needed = min(max(0, user.done - user.halo) for user in self.users)
            kept = self._buffer[:, :, needed - self.first : self.stop - self.first].clone()  # they overlap
            self._buffer[:, :, : kept.shape[2]] = kept
            self.first = needed
        at, self.stop = self.stop - self.first, self.stop + count
        return self._buffer[:, :, at : at + count]

    def rows(self, first: int, stop: int) -> Tensor:
        """[1, channels, stop - first, width]."""
        return self._buffer[:, :, first - self.first : stop - self.first]

    def held(self) -> tuple[Tensor, Window]:
        """All rows that are here, and where they lie."""
        return self.rows(self.first, self.stop), Window(self.height, self.width, self.first, 0)

    def around(self, first: int, stop: int) -> tuple[Tensor, int]:
        """Rows first to stop with one above and one below where the map has them, and how many are above."""
        above = min(1, first)
        return self.rows(first - above, min(self.height, stop + 1)), above


class Operation(ABC):
    """Reads `source`, and may write to `target`.

    `halo`: rows of input that it needs above and below a row; `step`: rows that it takes at once.
    """

    halo: ClassVar[int] = 0
    step: ClassVar[int] = 1

    def __init__(self, source: Lines) -> None:
        self.source, self.done = source, 0
        source.users.append(self)

    def advance(self) -> None:
        """Take what can be taken of the rows that have come."""
        source = self.source
        ready = source.stop if source.stop == source.height else max(0, source.stop - self.halo)
        ready -= ready % self.step
        if ready > self.done:
            self.take(self.done, ready)
            self.done = ready

    @abstractmethod
    def take(self, first: int, stop: int) -> None:
        """Rows first to stop, with their halo, are there."""

    def scratch(self) -> int:
        """Elements of memory that a call takes besides the lines, at most."""
        return 0


class _Making(Operation):
    """An operation that makes a map: of `channels`, `up` times as high and wide, `down` times less so."""

    def __init__(self, source: Lines, channels: int, up: int = 1, down: int = 1) -> None:
        super().__init__(source)
        most = (source.most + self.halo + self.step - 1) * up // down
        self.target = Lines(channels, source.height * up // down, source.width * up // down, most)

    def scratch(self) -> int:
        return 2 * self.target.channels * self.target.most * self.target.width


class Mixer(_Making):
    """The first half of a block, with statistics that are known for each cell of a grid."""

    halo = 3

    def __init__(self, source: Lines, block: Block, statistics: RegionStatistics, grid: Grid) -> None:
        super().__init__(source, source.channels)
        self._block, self._statistics, self._grid = block.weights, statistics, grid

    def take(self, first: int, stop: int) -> None:
        cell, rows = self._grid.rows.between(first, stop)
        here = RegionStatistics(*(t[:, cell : cell + len(rows) - 1] for t in self._statistics))
        x, window = self.source.held()
        block, out = self._block, self.target.come(stop - first)
        eps = (block.norm1_eps, block.bn_eps)
        regions.mixer_stage_apply(x, block.mixer, here, window, rows, self._grid.columns.cuts, *eps, out)

    def scratch(self) -> int:
        return 0


class FeedForward(_Making):
    """The second half of a block."""

    halo = 1

    def __init__(self, source: Lines, block: Block) -> None:
        super().__init__(source, source.channels)
        self._block = block.weights

    def take(self, first: int, stop: int) -> None:
        x, window = self.source.held()
        weights, eps, out = self._block.feed_forward, self._block.norm2_eps, self.target.come(stop - first)
        regions.feed_forward_stage_region(x, weights, window, (first, stop), (0, window.width), eps, out)

    def scratch(self) -> int:
        return 0


class Convolution(_Making):
    """3x3 or 1x1."""

    halo = 1

    def __init__(self, source: Lines, weight: Tensor) -> None:
        super().__init__(source, weight.shape[0])
        self._weight = weight

    def take(self, first: int, stop: int) -> None:
        self.target.come(stop - first).copy_(_convolved(self.source, self._weight, first, stop))


def _convolved(lines: Lines, weight: Tensor, first: int, stop: int) -> Tensor:
    if weight.shape[2] == 1:
        return mirage_kernels.dense_conv2d(lines.rows(first, stop), weight)
    # Where the map goes on, the row that saw zeros instead is cut off.
    x, above = lines.around(first, stop)
    return mirage_kernels.dense_conv2d(x, weight)[:, :, above : above + stop - first]


class Downsampling(_Making):
    halo, step = 1, 2

    def __init__(self, source: Lines, weight: Tensor) -> None:
        super().__init__(source, weight.shape[0] * 4, down=2)
        self._weight = weight

    def take(self, first: int, stop: int) -> None:
        made = _convolved(self.source, self._weight, first, stop)
        self.target.come((stop - first) // 2).copy_(F.pixel_unshuffle(made, 2))


class Upsampling(_Making):
    halo = 1

    def __init__(self, source: Lines, weight: Tensor) -> None:
        super().__init__(source, weight.shape[0] // 4, up=2)
        self._weight = weight

    def take(self, first: int, stop: int) -> None:
        made = _convolved(self.source, self._weight, first, stop)
        self.target.come(2 * (stop - first)).copy_(F.pixel_shuffle(made, 2))


class Joining(_Making):
    """Puts the channels of a stored map behind those that come."""

    def __init__(self, source: Lines, kept: FeatureMap) -> None:
        super().__init__(source, source.channels + kept.shape[0])
        self._kept = kept

    def take(self, first: int, stop: int) -> None:
        out = self.target.come(stop - first)
        out[:, : self.source.channels] = self.source.rows(first, stop)
        self._kept.read(first, out[0, self.source.channels :])

    def scratch(self) -> int:
        return 0


class Storing(Operation):
    """Writes the first channels of what comes into a map, or all of them into several maps one behind the other."""

    def __init__(self, source: Lines, maps: list[FeatureMap]) -> None:
        super().__init__(source)
        self._maps = maps

    def take(self, first: int, stop: int) -> None:
        rows, channel = self.source.rows(first, stop)[0], 0
        for map in self._maps:
            map.write(first, rows[channel : channel + map.shape[0]])
            channel += map.shape[0]


class Summing(Operation):
    """The sums that the next block's statistics follow from, of each cell of a grid: [rows, columns, K], float64."""

    halo = 1

    def __init__(self, source: Lines, block: Block, grid: Grid) -> None:
        super().__init__(source)
        self._weights, self._eps, self._grid = block.weights.mixer, block.weights.norm1_eps, grid
        self._sums: Tensor | None = None

    def take(self, first: int, stop: int) -> None:
        cell, rows = self._grid.rows.between(first, stop)
        x, window = self.source.held()
        found = regions.mixer_stage_sums(x, self._weights, window, rows, self._grid.columns.cuts, self._eps)[0]
        if self._sums is None:
            self._sums = found.new_zeros(self._grid.rows.cells, *found.shape[1:])
        self._sums[cell : cell + len(found)] += found

    def statistics(self, dtype: torch.dtype, bn_eps: float) -> RegionStatistics:
        assert self._sums is not None
        return self._grid.statistics(self._sums, self._weights, dtype, bn_eps)

    @staticmethod
    def scratch_of(weights: MixerWeights, grid: Grid) -> int:
        """Elements of float32 that the sums and statistics of a grid take."""
        branch, heads = weights.norm_weight.shape[0] // 3, weights.temperature.shape[0]
        of_cell = math.ceil(branch * (branch / heads) * 6) + 60 * branch
        return 2 * grid.rows.cells * grid.columns.cells * of_cell


class AddImage(Operation):
    """Adds the image to what comes, and hands the restored rows out."""

    def __init__(
        self, source: Lines, image: Callable[[int, int], Tensor], sink: Callable[[int, Tensor], None]
    ) -> None:
        super().__init__(source)
        self._image, self._sink = image, sink

    def take(self, first: int, stop: int) -> None:
        rows = self.source.rows(first, stop)
        self._sink(first, (rows + self._image(first, stop).to(rows))[0])
