"""Tiles: how they lie, how they are blended, and what happens when memory runs out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mirage.restore import restore_array
from mirage.restore import tiles as tiling
from mirage.restore.budget import SMALLEST_TILE, is_out_of_memory
from mirage.restore.tiles import check_tile, ramp, restore_tiles, spans


class Copy(nn.Module):
    """Returns its input, and remembers the shapes that came."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return x


class Mean(nn.Module):
    """What no tile can know: each gives its own mean."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).expand_as(x)


def reaching(radius: int) -> nn.Module:
    """A plain network whose results reach so far."""
    torch.manual_seed(radius)
    layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(radius)]
    return nn.Sequential(*itertools.chain.from_iterable((layer, nn.GELU()) for layer in layers), nn.Sigmoid()).eval()


def noise(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.mark.parametrize("tile", [8, 16, 64, 136])
@pytest.mark.parametrize("overlap", [0, 4, 8, 31])
def test_spans_cover_the_axis_evenly(tile, overlap):
    if 2 * overlap > tile:
        pytest.skip("refused by check_tile")
    for size in range(8, 600, 8):
        found = spans(size, tile, overlap)
        assert found[0][0] == 0 and found[-1][1] == size
        lengths = {stop - start for start, stop in found}
        assert len(lengths) == 1 and max(lengths) <= max(tile, min(size, tile))
        assert all(start % 8 == 0 for start, _ in found)
        least = min(overlap, tile // 2 // 8 * 8)
        for (_, before), (start, _) in itertools.pairwise(found):
            assert before - start >= least
        for first, third in zip(found, found[2:], strict=False):
            assert first[1] <= third[0] or overlap * 2 >= min(lengths) - 16  # two share a pixel, as a rule


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 31, 32, 64])
def test_ramps_are_a_partition_of_unity_and_smooth(count):
    later = ramp(count)
    earlier = later.flip(0)  # the same seam from the other side
    assert later.shape == (count,) and torch.allclose(later + earlier, torch.ones(count), atol=1e-6)
    assert (later.diff() >= 0).all() and ((0 <= later) & (later <= 1)).all()
    margin = count // 4
    assert (later[:margin] == 0).all() and (later[count - margin :] == 1).all()
    if count >= 32:
        assert later.diff().max() < 0.1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (203, 1), (37, 41), (200, 131)])
def test_the_identity_gives_back_every_sample(size, channels, dtype):
    pixels = noise((*size, channels), dtype)
    model = Copy()
    assert np.array_equal(restore_tiles(model, pixels, tile=64, overlap=16), pixels)
    assert len(set(model.shapes)) == 1  # one shape, whatever the size


def test_float32_comes_back_as_it_was():
    pixels = np.random.default_rng(0).random((90, 130, 3), np.float32)
    assert np.array_equal(restore_tiles(Copy(), pixels, tile=64, overlap=16), pixels)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(150, 203), (64, 300), (300, 40)])
def test_a_network_that_reaches_less_than_the_margin_sees_no_tiles(size, batch):
    model, pixels = reaching(8), noise((*size, 3), np.uint16)
    whole = restore_array(model, pixels).astype(int)
    tiled = restore_tiles(model, pixels, tile=96, overlap=32, batch=batch).astype(int)
    assert np.abs(tiled - whole).max() <= 1  # of 65535
    bare = restore_tiles(model, pixels, tile=96, overlap=0, batch=batch).astype(int)
    assert np.abs(bare - whole).max() > 20  # seams: the test would see them


def test_seams_are_faded():
    pixels = np.zeros((64, 240, 3), np.uint16)
    pixels[:, 120:] = 65535
    faded = restore_tiles(Mean(), pixels, tile=96, overlap=48)[32, :, 0].astype(int)
    hard = restore_tiles(Mean(), pixels, tile=96, overlap=0)[32, :, 0].astype(int)
    assert np.abs(np.diff(faded)).max() < np.abs(np.diff(hard)).max() / 4
    assert (np.diff(faded) >= 0).all()


def test_a_tile_larger_than_the_image_is_the_image():
    model, pixels = Mean(), noise((50, 70, 3), np.uint16)
    assert np.array_equal(restore_tiles(model, pixels, tile=512, overlap=32), restore_array(model, pixels))


# --- out of memory


class Starving(nn.Module):
    """Copies, and runs out of memory on inputs with more pixels than it may have; now and then from some call on."""

    def __init__(self, most: int, error: BaseException, after: int = 0) -> None:
        super().__init__()
        self.most, self.error, self.after = most, error, after
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x):
        self.after -= 1
        if self.after < 0 and x.shape[0] * x.shape[2] * x.shape[3] > self.most:
            raise self.error
        self.shapes.append(tuple(x.shape))
        return x


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["Python", "CUDA", "CPU"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_out_of_memory_halves_the_tile_and_goes_on(error, after):
    pixels, notes = noise((300, 400, 3), np.uint16), []
    model = Starving(100 * 100, error, after)
    restored = restore_tiles(model, pixels, tile=256, overlap=32, note=notes.append)
    assert np.array_equal(restored, pixels)
    assert notes and all("memory ran out" in note for note in notes)
    assert max(h * w for _, _, h, w in model.shapes[after:]) <= 100 * 100


def test_out_of_memory_halves_the_batch_first():
    pixels = noise((64, 400, 3))
    model = Starving(2 * 64 * 72, MemoryError())
    assert np.array_equal(restore_tiles(model, pixels, tile=64, overlap=8, batch=8), pixels)
    assert {shape[2:] for shape in model.shapes} == {(64, 64)} and max(shape[0] for shape in model.shapes) == 2


def test_rows_that_wait_for_more_than_a_tile_start_again():
    pixels = noise((400, 100, 3))
    model = Starving(64 * 64, MemoryError(), after=2)
    assert np.array_equal(restore_tiles(model, pixels, tile=128, overlap=64), pixels)


def test_out_of_memory_with_the_smallest_tiles_is_an_error():
    with pytest.raises(MemoryError):
        restore_tiles(Starving(0, MemoryError()), noise((300, 400, 3)), tile=256, overlap=32)
    with pytest.raises(RuntimeError, match="a fault"):  # another error is none of memory
        restore_tiles(Starving(0, RuntimeError("a fault")), noise((300, 400, 3)), tile=256, overlap=32)
    assert SMALLEST_TILE == 64


def test_what_pytorch_raises_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError())


def test_memory_does_not_grow_with_the_height(monkeypatch):
    """A strip, and what waits: nothing else is in floating point."""
    made = []
    empty = torch.empty

    def counting(*size, **options):
        result = empty(*size, **options)
        made.append(result.numel())
        return result

    monkeypatch.setattr(tiling.torch, "empty", counting)
    restore_tiles(Copy(), noise((1000, 64, 3)), tile=64, overlap=16)
    assert max(made) == 3 * 64 * 64


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (7, 0, "tile: expected a positive multiple of 8 pixels, got 7"),
        (100, 0, "tile: expected a positive multiple of 8 pixels, got 100"),
        (True, 0, "tile: expected a positive multiple of 8"),
        (64, -1, "overlap: expected a number of pixels from 0 on, got -1"),
        (64, 33, "overlap: expected at most half of tile=64, got 33"),
    ],
)
def test_tiles_that_cannot_be(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        check_tile(tile, overlap)
