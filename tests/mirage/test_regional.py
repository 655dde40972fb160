"""The network in strips: equal to one pass over the whole image, whatever the strips, and with windows' statistics."""

import errno
import gc
import os

import numpy as np
import pytest
import torch

import mirage
import mirage.fast
import mirage_kernels
from mirage.regional import Settings, run, run_global, run_local
from mirage.regional.grids import Axis
from mirage.regional.storage import Storage
from mirage_kernels import regions


def network(**options):
    """A small network with weights that are not those of a new one, which hides what stands before a zero."""
    torch.manual_seed(0)
    sizes = {"dim": 12, "num_blocks": (1, 2, 1, 2), "num_refinement_blocks": 1, "heads": (1, 2, 2, 4)}
    model = mirage.MIRAGE(**{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mirage.fast.accelerate(model)


MODEL = network()
ROOMY = 1 << 30


def strips(model, x, **settings):
    """Of an image [1, 3, H, W], in the dtype of x."""
    out = torch.full(x.shape, torch.nan, dtype=x.dtype)
    seen = []

    def sink(first, rows):
        seen.append((first, first + rows.shape[1]))
        out[0, :, first : first + rows.shape[1]] = rows

    run(model, lambda first, stop: x[0, :, first:stop], tuple(x.shape[2:]), sink, Settings(**settings))
    assert [first for first, _ in seen] == [0, *(stop for _, stop in seen[:-1])] and seen[-1][1] == x.shape[2]
    return out


def image(height, width, dtype=torch.float32):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def distance(value, expected, x):
    """Relative to what the network adds to the image."""
    return ((value - expected).double().norm() / (expected - x).double().norm()).item()


@pytest.mark.parametrize("size", [(8, 8), (40, 16), (16, 88), (72, 8)], ids=str)
@pytest.mark.parametrize("memory", [0, 30_000, ROOMY], ids=["file", "both", "memory"])
def test_equal_to_the_whole(size, memory):
    x = image(*size)
    with torch.inference_mode():
        expected = MODEL(x)
    for rows in {3, 7, size[0]}:
        assert distance(strips(MODEL, x, rows=rows, memory=memory), expected, x) < 1e-5, rows


def test_every_height_of_a_strip():
    x = image(16, 24)
    with torch.inference_mode():
        expected = MODEL(x)
    for rows in range(1, 17):
        assert distance(strips(MODEL, x, rows=rows, memory=0), expected, x) < 1e-5, rows


@pytest.mark.parametrize("blocks", [(0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 0, 0), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("refinement", [0, 2])
def test_levels_without_blocks(blocks, refinement):
    model, x = network(num_blocks=blocks, num_refinement_blocks=refinement), image(24, 32)
    with torch.inference_mode():
        expected = model(x)
    assert distance(strips(model, x, rows=5, memory=0), expected, x) < 1e-5


def test_closer_to_float64_than_twice_the_whole():
    x, exact = image(48, 40), network().double()
    with torch.inference_mode():
        truth, whole = exact(x.double()), MODEL(x)
    assert distance(strips(exact, x.double(), rows=6, memory=0), truth, x) < 1e-12
    assert distance(strips(MODEL, x, rows=6, memory=0), truth, x) < 2 * distance(whole, truth, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype):
    """As far from float64 as the whole pass: the maps in between are rounded as they are there."""
    x = image(32, 40)
    with torch.inference_mode():
        truth = MODEL(x)
        model = network().to(dtype)
        whole = model(x.to(dtype))
    for memory in (0, ROOMY):
        value = strips(model, x.to(dtype), rows=7, memory=memory)
        assert value.dtype == dtype
        assert distance(value.float(), truth, x) < 1.2 * distance(whole.float(), truth, x)


def test_on_plain_pytorch():
    x = image(24, 32)
    with torch.inference_mode():
        expected = MODEL(x)
    with mirage_kernels.use("torch"):
        assert distance(strips(MODEL, x, rows=9, memory=0), expected, x) < 1e-5


def test_the_same_bits_with_any_number_of_threads():
    x, before, results = image(64, 48), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([strips(MODEL, x, rows=16, memory=0, **more) for more in ({}, {"window": 24})])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_passes():
    """It is in every sum over the image, and so in every pixel, as in the whole pass; of windows, in some."""
    x = image(16, 160)
    x[0, 1, 3, 3] = torch.nan
    assert strips(MODEL, x, rows=16, memory=0).isnan().all()
    model = network(num_blocks=(1, 0, 0, 0), num_refinement_blocks=0)
    local = strips(model, x, rows=16, memory=0, window=16, overlap=0)
    assert local[..., :16].isnan().all() and local[..., 100:].isfinite().all()


# ---- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 19), (1, 1), (7, 40), (16, 16), (3, 9)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays(size, dtype):
    """What `restore_array` makes of them, up to one unit where a value lies between two."""
    values = np.random.default_rng(0).random((*size, 3))
    array = values.astype(np.float32) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)
    before, out = array.copy(), np.zeros(array.shape, dtype)
    assert run_global(MODEL, array, out, memory=1 << 24) is out
    assert np.array_equal(array, before)
    scale = 1.0 if dtype == np.float32 else float(np.iinfo(dtype).max)
    x = torch.from_numpy(array.astype(np.float32)).div(scale).permute(2, 0, 1)[None]
    for axis, pad in ((3, (0, -size[1] % 8, 0, 0)), (2, (0, 0, 0, -size[0] % 8))):
        x = torch.nn.functional.pad(x, pad, "reflect" if sum(pad) < x.shape[axis] else "replicate")
    with torch.inference_mode():
        expected = MODEL(x)[0, :, : size[0], : size[1]].double().clamp(0, 1).permute(1, 2, 0).numpy() * scale
    assert np.abs(out - expected).max() < (1e-5 if dtype == np.float32 else 0.51)


def test_what_is_not_finite_is_refused():
    array = np.full((16, 16, 3), 0.5, np.float32)
    array[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="the model's output has values that are not finite"):
        run_global(MODEL, array)


# ---- scratch -------------------------------------------------------------------------------------------------------


def open_files(folder):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.exists(link) and str(folder) in os.readlink(link)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc on this system")
def test_nothing_is_left(tmp_path):
    """Files have no name while they are used, and are closed at the end, also by an exception."""
    x, seen = image(32, 32), []

    def sink(first, rows):
        seen.append((os.listdir(tmp_path), len(open_files(tmp_path))))
        if first >= 16:
            raise KeyboardInterrupt

    settings = Settings(rows=4, memory=0, scratch=tmp_path)
    with pytest.raises(KeyboardInterrupt) as raised:
        run(MODEL, lambda first, stop: x[0, :, first:stop], (32, 32), sink, settings)
    assert raised.value is not None  # its traceback knows the maps
    assert seen and all(names == [] and count >= 2 for names, count in seen)
    assert open_files(tmp_path) == [] and os.listdir(tmp_path) == []


def test_maps_in_memory_open_no_file(tmp_path):
    assert strips(MODEL, image(16, 16), memory=ROOMY, scratch=tmp_path).isfinite().all()
    strips(MODEL, image(16, 16), rows=8, memory=ROOMY, scratch=tmp_path / "not there")
    with pytest.raises(NotADirectoryError, match="scratch: expected a folder"):
        strips(MODEL, image(16, 16), rows=8, memory=0, scratch=tmp_path / "not there")


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    called = []
    with pytest.raises(OSError, match=r"scratch: feature maps need \d+ bytes .* 1000 .* are available") as raised:
        run(MODEL, lambda *rows: called.append(rows), (32, 32), print, Settings(rows=8, memory=0, scratch=tmp_path))
    assert raised.value.errno == errno.ENOSPC and not called


def test_what_is_announced_is_what_is_taken(monkeypatch, tmp_path):
    """The bytes that are asked for are those of the files that are there at once."""
    announced, most = [], [0]
    monkeypatch.setattr(Storage, "check_space", lambda self, needed: announced.append(needed))
    made = Storage.map

    def counting(self, *args):
        found = made(self, *args)
        total = sum(np.prod(m.shape) * m.dtype.itemsize for m in self._maps if m._file is not None)
        most[0] = max(most[0], int(total))
        return found

    monkeypatch.setattr(Storage, "map", counting)
    strips(MODEL, image(32, 48), rows=8, memory=0)
    gc.collect()
    assert most[0] <= announced[0] <= 1.2 * most[0]


def test_memory_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="memory: expected at least .* for strips of an image 4000 pixels wide"):
        run(MODEL, lambda *rows: torch.zeros(3, 8, 4000), (8, 4000), print, Settings(memory=1000))


# ---- what cannot be run --------------------------------------------------------------------------------------------


def test_models_that_are_not_recognised_are_refused_by_name():
    x = image(16, 16)
    with pytest.raises(TypeError, match="model: expected a mirage.MIRAGE, got Linear"):
        strips(torch.nn.Linear(1, 1), x)
    with pytest.raises(ValueError, match=r"encoder_level1\.0: expected a block of mirage\.fast, got TransformerBlock"):
        strips(mirage.fast.revert(network()), x)
    model = network()
    model.latent[1].ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"latent\.1: .*hooks"):
        strips(model, x)
    model = network()
    model.down2_3.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="down2_3: .*hooks"):
        strips(model, x)
    model = network()
    model.reduce_chan_level3 = torch.nn.Conv2d(72, 48, 1)
    with pytest.raises(ValueError, match="reduce_chan_level3: expected a 1x1 convolution without bias"):
        strips(model, x)
    with pytest.raises(ValueError, match=r"encoder_level1\.0: .*training mode"):
        strips(network().train(), x)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="size: expected positive multiples of 8, got 12x16"):
        strips(MODEL, image(12, 16))
    array = np.zeros((16, 16, 3), np.uint8)
    for wrong, kind, match in (
        ((array[..., :2],), ValueError, r"image: expected shape \[H, W, 3\]"),
        ((array.astype(np.float64),), TypeError, "image: expected uint8, uint16 or float32, got float64"),
        ((array, array[:8]), ValueError, "out: expected shape"),
    ):
        with pytest.raises(kind, match=match):
            run_global(MODEL, *wrong)
    for more, match in (({"window": 12}, "window: expected a positive"), ({"window": 8, "overlap": 1}, "overlap")):
        with pytest.raises(ValueError, match=match):
            run_local(MODEL, array, **more)


# ---- windows -------------------------------------------------------------------------------------------------------


def tlc_starts(size, window):
    """Where the converter for Restormer puts windows along an axis: as few as cover it, at equal steps rounded up, the
    last one moved inside."""
    count = (size - 1) // window + 1
    step = window if count == 1 else int(np.ceil((size - window) / (count - 1) - 1e-8))
    starts, at = [], 0
    while True:
        if at + window >= size:
            return [*starts, size - window]
        starts.append(at)
        at += step


@pytest.mark.parametrize(("size", "window"), [(100, 24), (48, 24), (49, 24), (47, 24), (25, 24), (300, 7), (24, 23)])
def test_windows_without_overlap_are_those_of_tlc(size, window):
    axis = Axis.of(size, window)
    assert [axis.cuts[first] for first, _ in axis.windows] == tlc_starts(size, window)
    assert [axis.cuts[stop] - axis.cuts[first] for first, stop in axis.windows] == [window] * len(axis.windows)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
def test_axes(overlap):
    for size, window in ((100, 24), (25, 24), (24, 24), (23, 24), (57, 8), (9, 1)):
        axis = Axis.of(size, window, overlap)
        assert axis.cuts[0] == 0 and axis.cuts[-1] == size
        covered = np.zeros(size, int)
        for first, stop in axis.windows:
            covered[axis.cuts[first] : axis.cuts[stop]] += 1
        assert covered.min() >= 1
        starts = [axis.cuts[first] for first, _ in axis.windows]
        assert max(np.diff(starts), default=0) <= max(1, np.ceil(window * (1 - overlap)))
        values = torch.arange(axis.cells, dtype=torch.float64).unsqueeze(1)
        sums = axis.sums_of_windows(values)
        assert [int(s) for s in sums] == [sum(range(first, stop)) for first, stop in axis.windows]
        means = axis.averages_of_cells(sums)
        for cell in range(axis.cells):
            over = [float(sums[i]) for i, (first, stop) in enumerate(axis.windows) if first <= cell < stop]
            assert float(means[cell]) == pytest.approx(np.mean(over))
        for first in range(size):
            cell, cuts = axis.between(first, min(size, first + 13))
            assert axis.cuts[cell] <= first < axis.cuts[cell + 1]
            assert cuts == sorted({first, min(size, first + 13), *(c for c in axis.cuts if first < c < first + 13)})


def test_an_image_within_the_window_is_the_whole():
    x = image(40, 48)
    with torch.inference_mode():
        expected = MODEL(x)
    assert distance(strips(MODEL, x, rows=9, memory=0, window=48, overlap=0.5), expected, x) < 1e-5
    assert distance(strips(MODEL, x, rows=9, memory=0, window=40, overlap=0.5), expected, x) > 1e-3


def with_windows(packed, x, window, starts):
    """A block by definition: the statistics of each window by itself, and for each pixel the average over those that it
    lies in."""
    height, width = x.shape[2:]
    where, total = regions.Window(height, width), torch.zeros(height, width, 1, 1, 1)
    attention, kernels = 0, 0
    for top in starts(height):
        for left in starts(width):
            area = (top, top + window), (left, left + window)
            sums = regions.mixer_stage_sums(x, packed.mixer, where, *area)
            found = regions.mixer_stage_statistics(sums, window**2, packed.mixer, x.dtype)
            inside = torch.zeros_like(total)
            inside[top : top + window, left : left + window] = 1
            total += inside
            attention = attention + inside * found.attention[0, 0, 0]
            kernels = kernels + inside[..., 0] * found.kernels[0, 0, 0]
    of_pixels = regions.RegionStatistics((attention / total)[None], (kernels / total[..., 0])[None])
    pixels = tuple(range(height + 1)), tuple(range(width + 1))
    y = regions.mixer_stage_apply(x, packed.mixer, of_pixels, where, *pixels)
    return regions.feed_forward_stage_region(y, packed.feed_forward, where, (0, height), (0, width))


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_blocks_with_windows(overlap):
    def model():
        return network(num_blocks=(1, 0, 0, 0), num_refinement_blocks=0)

    def starts(size):
        return range(0, size - 15, 8) if overlap else tlc_starts(size, 16)

    x, slow = image(40, 32), model()
    for level in (slow.encoder_level1, slow.decoder_level1):
        (packed,) = mirage_kernels.PackedBlocks(*type(level[0]).matcher.match(level[0]))
        level[0].register_forward_hook(lambda _, xs, y, packed=packed: with_windows(packed, xs[0], 16, starts))
    with torch.inference_mode():
        expected = slow(x)
    assert distance(strips(model(), x, rows=7, memory=0, window=16, overlap=overlap), expected, x) < 1e-5


def test_local_does_not_depend_on_strips():
    x = image(56, 40)
    first = strips(MODEL, x, rows=56, memory=ROOMY, window=24, overlap=0.5)
    for rows in (1, 5, 16):
        assert distance(strips(MODEL, x, rows=rows, memory=0, window=24, overlap=0.5), first, x) < 1e-5


def test_run_local_on_arrays():
    array = np.random.default_rng(0).random((41, 30, 3), np.float32)
    whole, same = run_global(MODEL, array), run_local(MODEL, array, window=48)
    assert np.abs(whole - same).max() < 1e-5
    assert np.abs(whole - run_local(MODEL, array, window=16)).max() > 1e-4
