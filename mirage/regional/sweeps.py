"""The network on an image of any size, in sweeps over strips of rows.

A block needs sums over the whole map that comes in, so there is one sweep for each: it reads a map strip by strip,
runs the block and what follows it up to the next block, writes the map that this one takes, and sums up over it on the
way. What a sweep writes, it writes in place of what it has read where sizes allow. At each end stands the image.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mirage.memory import format_bytes
from mirage.model import STRIDE
from mirage.regional import lines as ops
from mirage.regional.grids import Axis, Grid
from mirage.regional.lines import Lines, Operation
from mirage.regional.network import Block, Conv, Down, Join, Keep, Output, Step, Up, steps_of
from mirage.regional.storage import FeatureMap, Storage
from mirage_kernels.regions import RegionStatistics

__all__ = ["Settings", "run"]

Source = Callable[[int, int], Tensor]
Sink = Callable[[int, Tensor], None]
STRIPS_SHARE = 3  # strips take at most this part of the memory, maps the rest
FEWEST_ROWS, MOST_ROWS = 8, 64  # of a strip that is not prescribed; of more the kernels gain nothing


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        memory: bytes that strips and maps may take together. See `mirage.regional.run_global`.
        scratch: the folder of files for maps that do not fit; None for the system's for temporary files.
        window: side in pixels of the image of the windows whose statistics are used; None for the whole image's.
        overlap: the least part of a window that it shares with the next.
        rows: rows of a strip at every level; None: as many as the memory allows.
        progress: called with the number of sweeps that are done and of all.
    """

    memory: int = 1 << 30
    scratch: str | os.PathLike[str] | None = None
    window: int | None = None
    overlap: float = 0.0
    rows: int | None = None
    progress: Callable[[int, int], None] | None = None


@torch.no_grad()
def run(model: nn.Module, source: Source, size: tuple[int, int], sink: Sink, settings: Settings) -> None:
    """Restore one image.

    Args:
        model: an accelerated `mirage.MIRAGE` in evaluation mode.
        source: ``source(first, stop)`` gives rows of the image, [1 or nothing, channels, stop - first, width].
        size: height and width, multiples of 8.
        sink: ``sink(first, rows)`` receives restored rows [channels, n, width], each once, from the top on.

    Raises:
        TypeError, ValueError: `model` cannot be run so (see `steps_of`), or an argument is wrong.
        OSError: there is not enough room in the scratch folder.
    """
    height, width = size
    if height <= 0 or width <= 0 or height % STRIDE or width % STRIDE:
        raise ValueError(f"size: expected positive multiples of {STRIDE}, got {height}x{width}")
    with contextlib.closing(_Run(steps_of(model), source, size, sink, settings)) as whole:
        whole.run()


@dataclass
class _State:
    """Between two sweeps: the map that comes next, as stored maps of consecutive channels, and its statistics."""

    maps: list[FeatureMap] = field(default_factory=list)
    level: int = 0
    statistics: RegionStatistics | None = None

    @property
    def channels(self) -> int:
        return sum(map.shape[0] for map in self.maps)


class _Run:
    def __init__(
        self, steps: list[Step], source: Source, size: tuple[int, int], sink: Sink, settings: Settings
    ) -> None:
        self.source, self.size, self.sink, self.settings = source, size, sink, settings
        first = steps[0]
        assert isinstance(first, Conv)
        self.image_channels, self.dim = first.weight.shape[1], first.weight.shape[0]
        self.dtype, self.device = first.weight.dtype, first.weight.device
        self.sweeps = list(_sweeps(steps))
        self.kept: dict[str, FeatureMap] = {}
        self.state = _State()
        self.memory = torch.empty(0)
        strips, maps = self._share_memory(settings)
        self.strips = strips
        self.storage = Storage(settings.scratch, maps)
        needed = self._all_maps() - maps
        if needed > 0:
            self.storage.check_space(needed)

    def close(self) -> None:
        """Files go with the last reference to them."""
        self.kept.clear()
        self.state = _State()
        self.storage.close()

    def run(self) -> None:
        for i, steps in enumerate(self.sweeps):
            self._sweep(steps, self.sweeps[i + 1][0] if i + 1 < len(self.sweeps) else None)
            if self.settings.progress is not None:
                self.settings.progress(i + 1, len(self.sweeps))

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def _map_bytes(self, level: int, channels: int) -> int:
        height, width = self.size
        return channels * (height >> level) * (width >> level) * self.dtype.itemsize

    def _all_maps(self) -> int:
        """Bytes of all maps that are there at once, at most: the encoder's four, and half of the decoder's last."""
        return sum(self._map_bytes(level, self.dim << level) for level in (0, 0, 1, 2, 3))

    def _share_memory(self, settings: Settings) -> tuple[int, int]:
        """Bytes for strips, and bytes for maps."""
        if settings.rows is not None:
            return 0, max(0, settings.memory)
        strips = max(settings.memory // STRIPS_SHARE, settings.memory - self._all_maps())
        return strips, settings.memory - strips

    def _grid(self, level: int) -> Grid:
        window = self.settings.window
        of_level = None if window is None else max(1, window >> level)
        axes = (Axis.of(side >> level, of_level, self.settings.overlap) for side in self.size)
        return Grid(*axes)

    # ---- one sweep -------------------------------------------------------------------------------------------------

    def _sweep(self, steps: list[Step], following: Step | None) -> None:
        """Runs `steps` over what is stored, and stores what `following`, a block, takes."""
        rows = self.settings.rows or self._rows(steps, following)
        chain = self._chain(steps, following, rows)
        self._give_memory(chain)
        start, state = chain.lines[0], self.state
        while start.stop < start.height:
            count, first = min(rows, start.height - start.stop), start.stop
            self._load(first, start.come(count), state)
            for operation in chain.operations:
                operation.advance()
        for each in chain.lines:
            each.release()
        self.state = chain.state
        if chain.summing is not None and isinstance(following, Block):
            chain.state.statistics = chain.summing.statistics(self.dtype, following.weights.bn_eps)

    def _give_memory(self, chain: _Chain) -> None:
        """The same for all sweeps: every page of new memory would be a fault."""
        needed = sum(each.elements for each in chain.lines)
        if self.memory.numel() < needed:
            self.memory = torch.empty(0)
            self.memory = torch.empty(needed, dtype=self.dtype, device=self.device)
        at = 0
        for each in chain.lines:
            each.take(self.memory[at : at + each.elements])
            at += each.elements

    def _load(self, first: int, into: Tensor, state: _State) -> None:
        if not state.maps:
            into.copy_(self._image(first, first + into.shape[2]))
            return
        channel = 0
        for map in state.maps:
            map.read(first, into[0, channel : channel + map.shape[0]])
            channel += map.shape[0]

    def _image(self, first: int, stop: int) -> Tensor:
        rows = self.source(first, stop)
        return rows if rows.dim() == 4 else rows.unsqueeze(0)

    def _rows(self, steps: list[Step], following: Step | None) -> int:
        """The most rows of a strip whose buffers fit."""

        def needed(rows: int) -> int:
            return self._chain(steps, following, rows, dry=True).bytes(self.dtype)

        best, fewest = FEWEST_ROWS, needed(FEWEST_ROWS)
        if fewest > max(self.strips, self.settings.memory // 2):
            raise ValueError(
                f"memory: expected at least {format_bytes(2 * fewest)} for strips of an image "
                f"{self.size[1]} pixels wide, got {format_bytes(self.settings.memory)}"
            )
        while best * 2 <= MOST_ROWS and needed(best * 2) <= self.strips:
            best *= 2
        return best

    def _chain(self, steps: list[Step], following: Step | None, rows: int, dry: bool = False) -> _Chain:
        level, channels = self.state.level, self.state.channels or self.image_channels
        start = Lines(channels, self.size[0] >> level, self.size[1] >> level, rows)
        chain = _Chain(self, start, level, dry)
        for step in steps:
            chain.add(step)
        if isinstance(following, Block):
            chain.end(following)
        return chain


def _sweeps(steps: list[Step]) -> Iterator[list[Step]]:
    """The steps up to the first block, and each block with those up to the next."""
    current: list[Step] = []
    for step in steps:
        if isinstance(step, Block) and current:
            yield current
            current = []
        current.append(step)
    yield current


class _Chain:
    """The operations of a sweep, each on the lines that the one before makes. `dry`: only to learn their sizes."""

    def __init__(self, run: _Run, start: Lines, level: int, dry: bool) -> None:
        self.run, self.level, self.dry = run, level, dry
        self.lines = [start]
        self.operations: list[Operation] = []
        self.summing: ops.Summing | None = None
        self.state = _State(level=level)
        self._free = [] if dry else list(run.state.maps)  # maps that may be written over once read
        self._joined: FeatureMap | None = None  # whose channels are the last of the lines, where nothing followed

    def bytes(self, dtype: torch.dtype) -> int:
        scratch = max((operation.scratch() for operation in self.operations), default=0)
        return (sum(each.elements for each in self.lines) + scratch) * dtype.itemsize

    def _use(self, operation: Operation) -> None:
        self.operations.append(operation)
        target = getattr(operation, "target", None)
        if target is not None:
            self.lines.append(target)
            self._joined = None

    def add(self, step: Step) -> None:
        last = self.lines[-1]
        if isinstance(step, Block):
            statistics = self.run.state.statistics
            assert statistics is not None
            self._use(ops.Mixer(last, step, statistics, self.run._grid(self.level)))
            self._use(ops.FeedForward(self.lines[-1], step))
        elif isinstance(step, Keep):
            self._keep(step.name)
        elif isinstance(step, Join):
            self._join(step.name)
        elif isinstance(step, Down):
            self._use(ops.Downsampling(last, step.weight))
            self.level += 1
        elif isinstance(step, Up):
            self._use(ops.Upsampling(last, step.weight))
            self.level -= 1
        elif isinstance(step, Output):
            self._use(ops.Convolution(last, step.weight))
            self._use(ops.AddImage(self.lines[-1], self.run._image, self.run.sink))
        else:
            self._use(ops.Convolution(last, step.weight))

    def _keep(self, name: str) -> None:
        maps = self._room(self.lines[-1])
        self._use(ops.Storing(self.lines[-1], maps))
        if not self.dry:
            (self.run.kept[name],) = maps

    def _join(self, name: str) -> None:
        if self.dry:
            shape = (self.lines[-1].channels, self.lines[-1].height, self.lines[-1].width)
            self._use(ops.Joining(self.lines[-1], _Shape(shape)))  # type: ignore[arg-type]
            return
        kept = self.run.kept.pop(name)
        self._use(ops.Joining(self.lines[-1], kept))
        self._joined = kept
        self._free.append(kept)

    def end(self, following: Block) -> None:
        """The map that the next sweep reads, and its sums."""
        last = self.lines[-1]
        self.state.level = self.level
        if self._joined is not None:  # its channels are stored already
            first = last.channels - self._joined.shape[0]
            self.state.maps = [self._new(first, last), self._joined]
            self._use(ops.Storing(last, self.state.maps[:1]))
        else:
            self.state.maps = self._room(last)
            self._use(ops.Storing(last, self.state.maps))
        self.summing = ops.Summing(last, following, self.run._grid(self.level))
        self.operations.append(self.summing)

    def _room(self, lines: Lines) -> list[FeatureMap]:
        """Where to store a map: in place of those that the sweep reads, where they are of its size."""
        if self.dry:
            return []
        free = [map for map in self._free if map.shape[1:] == (lines.height, lines.width)]
        for maps in ([map] for map in free):
            if maps[0].shape[0] == lines.channels:
                self._free.remove(maps[0])
                return maps
        if free and sum(map.shape[0] for map in free) == lines.channels:
            self._free = [map for map in self._free if map not in free]
            return free
        return [self._new(lines.channels, lines)]

    def _new(self, channels: int, lines: Lines) -> FeatureMap:
        deeper = (self.run._map_bytes(level, self.run.dim << level) for level in (1, 2, 3))
        is_first = self.level == 0 and not self.run.kept
        reserve = sum(deeper) if is_first else 0  # they are read and written more often
        return self.run.storage.map(channels, lines.height, lines.width, self.run.dtype, reserve)


@dataclass(frozen=True)
class _Shape:
    """Stands for a map of which only the shape matters."""

    shape: tuple[int, int, int]
