"""`mirage.Restorer`: modes, memory, arrays, files that are done before, weights by name, threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden import mirage_mini
from torch import nn

import mirage
import mirage.fast
from mirage.cli import main
from mirage.images import ImageFile, read_image, write_image
from mirage.restore import (
    budget,
    collect_jobs,
    loading,
    modes,
    packaged_features,
    packaged_weights,
    resolve_weights,
    restore_array,
)
from mirage.restore.budget import NotEnoughMemory, choose_tile, network_memory, parse_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 1 << 30


class Copy(nn.Module):
    def forward(self, x):
        return x


def noise(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.fixture(scope="module")
def network():
    return mirage_mini().eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, network):
    path = tmp_path_factory.mktemp("weights") / "mini.safetensors"
    mirage.save_checkpoint(network, path)
    return path


def folder_of(path: Path, count: int = 3) -> Path:
    path.mkdir()
    for n in range(count):
        write_image(path / f"{n}.png", ImageFile(noise((16, 24, 3), seed=n)))
    return path


# --- arrays


@pytest.mark.parametrize("attention", ["auto", "whole", "tile", "local", "global"])
@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (24, 40, 1), (33, 20, 2), (20, 33, 3), (1, 30, 4)])
def test_shapes_and_types_come_back(network, attention, shape):
    restorer = mirage.Restorer(network, attention=attention, device="cpu")
    for dtype in (np.uint8, np.uint16, np.float32):
        array = noise(shape, np.uint16).astype(dtype) if dtype != np.float32 else noise(shape) / np.float32(255)
        before = array.copy()
        restored = restorer(array)
        assert restored.shape == shape and restored.dtype == dtype and np.array_equal(array, before)
        if shape[-1] in (2, 4) and len(shape) == 3:
            assert np.array_equal(restored[..., -1], array[..., -1])
        image = array[..., None] if array.ndim == 2 else array
        whole = restore_array(network, image).reshape(shape)  # smaller than a tile and a window: the same in all modes
        limit = 1e-5 if dtype == np.float32 else 1
        assert np.abs(restored.astype(np.float64) - whole).max() <= limit


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_global_is_one_pass(network, channels):
    array = noise((70, 101, channels)) / np.float32(255)
    whole = mirage.Restorer(network, attention="whole", device="cpu")(array)
    strips = mirage.Restorer(network, attention="global", device="cpu")(array)
    tiled = mirage.Restorer(network, tile=32, overlap=8, device="cpu")(array)
    assert np.abs(strips - whole).max() <= 1e-5 < np.abs(tiled - whole).max()


def test_lists_give_lists(network):
    arrays = [noise((8, 9, 3)), noise((16, 8), np.uint16)]
    restorer = mirage.Restorer(network, device="cpu")
    for given, restored in zip(arrays, restorer(arrays), strict=True):
        assert np.array_equal(restored, restorer(given))


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (torch.zeros(4, 4), TypeError, "array: expected a numpy array, got Tensor"),
        (np.zeros((4, 4, 3)), TypeError, "array: expected uint8, uint16 or float32, got float64"),
        (np.zeros((4, 4, 3), np.int8), TypeError, "got int8"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"not empty, got \[0, 4, 3\]"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"got \[4, 4, 5\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, r"got \[1, 4, 4, 3\]"),
        (np.zeros(4, np.uint8), ValueError, r"got \[4\]"),
        (np.full((4, 4, 3), np.nan, np.float32), ValueError, "expected finite values"),
        (np.full((4, 4, 3), np.inf, np.float32), ValueError, "expected finite values"),
        (np.full((4, 4, 3), 255, np.float32), ValueError, r"expected float32 values in \[0, 1\], got 255 to 255"),
    ],
)
def test_what_is_no_image_is_refused(array, error, message):
    with pytest.raises(error, match=message):
        mirage.Restorer(Copy(), device="cpu")(array)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "some"}, "attention: expected one of auto, whole, tile, local, global, got 'some'"),
        ({"dtype": "fp8"}, "dtype: expected fp32, bf16 or fp16, got 'fp8'"),
        ({"memory": "lots"}, "memory: expected bytes such as 2G"),
        ({"tile": 100}, "tile: expected a positive multiple of 8"),
        ({"tile": 64, "overlap": 40}, "overlap: expected at most half of tile=64, got 40"),
        ({"tile": 64, "attention": "global"}, "tile: goes with attention tile"),
        ({"scratch": "/no/such/folder"}, "scratch: expected a folder that is there, got '/no/such/folder'"),
        ({"attention": "local", "fast": False}, "attention: local needs the fast modules"),
        ({"attention": "global", "fast": False}, "attention: global needs the fast modules"),
        ({"window": 100}, "window: expected a positive multiple of 8, got 100"),
        ({"device": "abacus"}, "device: expected auto, cpu or cuda"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        mirage.Restorer(Copy(), **arguments)


@pytest.mark.parametrize(("tile", "overlap"), [(None, 32), (8, 4), (32, 16), (56, 28), (64, 32), (512, 32)])
def test_small_tiles_overlap_by_half_unless_told_otherwise(tile, overlap):
    assert mirage.Restorer(Copy(), tile=tile).settings.overlap == overlap
    assert mirage.Restorer(Copy(), tile=tile, overlap=2).settings.overlap == 2


def test_the_module_given_is_left_alone(network):
    model = mirage_mini().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    restorer = mirage.Restorer(model, dtype="bf16")
    assert (
        model.training and not isinstance(model, mirage.fast.MIRAGE) and next(model.parameters()).dtype == torch.float32
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert next(restorer.model.parameters()).dtype == torch.bfloat16 and not restorer.model.training
    shared = mirage.Restorer(model)
    assert isinstance(shared.model, mirage.fast.MIRAGE)
    assert {p.data_ptr() for p in shared.model.parameters()} == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 8), ("fp16", 2)])
def test_sixteen_bits_on_the_cpu(network, dtype, limit):
    pixels = noise((40, 48, 3))
    exact = mirage.Restorer(network, device="cpu")(pixels).astype(int)
    assert np.abs(mirage.Restorer(network, dtype=dtype, device="cpu")(pixels) - exact).max() <= limit


def test_import_is_light():
    code = "import sys, mirage; print([m for m in sys.modules if m.startswith(('PIL', 'mirage.re', 'mirage.im'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "[]"


def test_threads_give_what_one_gives(network):
    arrays = [noise((24 + 8 * (n % 3), 40, 3), seed=n) for n in range(12)]
    for attention in ("whole", "tile", "global"):
        restorer = mirage.Restorer(network, attention=attention, device="cpu")
        expected = [restorer(array) for array in arrays]
        with ThreadPoolExecutor(4) as pool:
            for found, right in zip(pool.map(restorer, arrays), expected, strict=True):
                assert np.array_equal(found, right)


# --- memory


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2G", 2 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("800MB", 800 << 20),
        ("4096", 4096),
        (5, 5),
        ("1k", 1024),
        ("1T", 1 << 40),
    ],
)
def test_bytes_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "2X", "2 G B", True, "nan"])
def test_bytes_that_are_none(text):
    with pytest.raises(ValueError, match="memory: expected bytes such as 2G"):
        parse_bytes(text)


def test_tiles_are_as_large_as_memory_allows(network):
    model = mirage.fast.accelerate(mirage_mini())
    sides = [choose_tile(model, left << 20, 6000) for left in (32, 64, 256, 1024, 1 << 20)]
    assert sides == sorted(sides) and sides[0] >= 64 and sides[-1] == budget.LARGEST_TILE
    for left, side in zip((32, 64, 256, 1024), sides, strict=False):
        taken = network_memory(model, side * side) + side * 6000 * budget.STRIP_BYTES_PER_PIXEL
        assert taken <= left << 20 and side % 8 == 0
    with pytest.raises(NotEnoughMemory, match="the smallest tiles need about"):
        choose_tile(model, 1 << 20, 6000)


def test_auto_is_whole_where_it_fits_and_global_where_not(network, monkeypatch):
    ran = []
    monkeypatch.setattr(modes, "restore_array", lambda *a: ran.append("whole") or restore_array(*a))
    strips = modes._restore_in_strips
    monkeypatch.setattr(modes, "_restore_in_strips", lambda *a: ran.append("global") or strips(*a))
    restorer = mirage.Restorer(network, device="cpu")
    pixels = noise((40, 64, 3))
    restorer(pixels)
    monkeypatch.setattr(modes, "needed_memory", lambda *a: 1 << 60)
    restorer(pixels)
    assert ran == ["whole", "global"]


def test_whole_refuses_what_a_budget_does_not_allow(network):
    budget.release_memory()  # what other tests have left would be given back, and leave more of the budget
    restorer = mirage.Restorer(network, attention="whole", memory=budget.anonymous_memory() + (64 << 20), device="cpu")
    if not budget.anonymous_memory():
        pytest.skip("this system does not tell how much memory a process has of its own")
    with pytest.raises(NotEnoughMemory, match=r"1000x1000 pixels need about .* are available \(memory budget"):
        restorer(np.zeros((1000, 1000, 3), np.uint8))
    slow = mirage.Restorer(network, fast=False, memory=1 << 20, device="cpu")  # which cannot run in strips
    with pytest.raises(NotEnoughMemory, match="memory budget, 1 MiB"):
        slow(np.zeros((1000, 1000, 3), np.uint8))


class Starving(Copy):
    def forward(self, x):
        raise MemoryError


def test_auto_goes_on_in_strips_when_one_pass_runs_out(network, monkeypatch):
    def starve(*_):
        raise MemoryError

    monkeypatch.setattr(modes, "restore_array", starve)
    notes: list[str] = []
    pixels = noise((40, 64, 3))
    restorer = mirage.Restorer(network, device="cpu")
    restored = restorer._restore(pixels, notes.append)
    assert notes == ["memory ran out; went on in strips (attention global)"]
    assert np.abs(restored.astype(int) - restore_array(network, pixels)).max() <= 1
    with pytest.raises(MemoryError):
        mirage.Restorer(network, attention="whole", device="cpu")(pixels)


BUDGET = """
import sys
sys.path[:0] = [{repository!r}, {tests!r}]
import numpy as np, torch
from golden import mirage_mini
import mirage
from benchmarks.attention_modes import PeakAnonymous
from mirage.restore.budget import Size, anonymous_memory, needed_memory
torch.set_num_threads(2)
pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
memory = anonymous_memory() + (400 << 20)
restorer = mirage.Restorer(mirage_mini(), attention={attention!r}, memory=memory, device="cpu")
assert needed_memory(restorer.model, Size(1000, 1000, 3, 8)) > 400 << 20
with PeakAnonymous() as peak:
    restorer(pixels)
print(peak.bytes - memory)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("attention", ["tile", "global"])
def test_the_budget_is_kept(attention):
    """With less than one pass takes, by `needed_memory`."""
    import mirage_kernels

    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip("the C++ library is not built")
    code = BUDGET.format(repository=str(REPOSITORY), tests=str(REPOSITORY / "tests"), attention=attention)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 0


# --- files


def test_finished_files_are_skipped(network, tmp_path):
    folder, out = folder_of(tmp_path / "in"), tmp_path / "out"
    restorer = mirage.Restorer(network, device="cpu")
    first = list(restorer.files(folder, out))
    assert [(o.error, o.skipped) for o in first] == [(None, False)] * 3 and all(o.seconds > 0 for o in first)
    contents = {path: path.read_bytes() for path in out.iterdir()}
    (out / "0.png").unlink()  # as if stopped before
    os.utime(folder / "1.png", ns=(time.time_ns() + 10**10,) * 2)  # changed since
    (out / "2.png").write_bytes(b"another's")  # whose it is nobody knows
    again = list(restorer.files([str(folder)], out))
    assert [o.skipped for o in again] == [False, False, True]
    assert (out / "2.png").read_bytes() == b"another's"
    assert [o.skipped for o in restorer.files(folder, out, overwrite=True)] == [False] * 3
    assert {path: path.read_bytes() for path in out.iterdir()} == contents


def test_an_empty_result_is_not_finished(tmp_path):
    folder, out = folder_of(tmp_path / "in", 1), tmp_path / "out"
    out.mkdir()
    (out / "0.png").touch()
    (outcome,) = mirage.Restorer(Copy(), device="cpu").files(folder, out)
    assert not outcome.skipped and np.array_equal(read_image(out / "0.png").pixels, noise((16, 24, 3)))


def test_files_are_read_as_they_are_asked_for(tmp_path):
    folder, out = folder_of(tmp_path / "in"), tmp_path / "out"
    outcomes = mirage.Restorer(Copy(), device="cpu").files(folder, out)
    assert not out.exists()
    assert next(outcomes).target.exists() and len(list(out.iterdir())) == 1


def test_the_command_goes_on(checkpoint, tmp_path):
    folder, out = folder_of(tmp_path / "in"), tmp_path / "out"
    arguments = ["restore", str(folder), "--weights", str(checkpoint), "-o", str(out), "--device", "cpu"]
    assert "restored 3 of 3" in CliRunner().invoke(main, arguments).stdout
    (out / "1.png").unlink()
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and f"restored 1 of 3 into {out}, 2 were finished before" in result.stdout
    assert f"restored 3 of 3 into {out}\n" in CliRunner().invoke(main, [*arguments, "--overwrite"]).stdout
    for extra in (["--tile", "64", "--overlap", "8"], ["--attention", "global", "--memory", "4G"], ["--dtype", "bf16"]):
        result = CliRunner().invoke(main, [*arguments, "--overwrite", *extra])
        assert result.exit_code == 0 and "restored 3 of 3" in result.stdout
    wrong = CliRunner().invoke(main, [*arguments, "--memory", "much"])
    assert wrong.exit_code == 2 and "expected bytes such as 2G" in wrong.stderr
    wrong = CliRunner().invoke(main, [*arguments, "--tile", "64", "--overlap", "40"])
    assert wrong.exit_code == 2 and "overlap: expected at most half of tile=64, got 40" in wrong.stderr


STOPPED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
import mirage.restore.modes as modes
right = modes.restore_array
def slow(model, pixels):
    print("began", file=sys.stderr, flush=True)
    time.sleep(0.5)
    return right(model, pixels)
modes.restore_array = slow
from mirage.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_leaves_whole_files_and_says_how_to_go_on(which, checkpoint, tmp_path):
    folder, out = folder_of(tmp_path / "in", 20), tmp_path / "out"
    arguments = ["restore", str(folder), "--weights", str(checkpoint), "-o", str(out), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", STOPPED, *arguments], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=_environment())  # fmt: skip
    said: list[str] = []
    began = threading.Event()

    def listen() -> None:
        for line in process.stderr:
            said.append(line)
            if sum("began" in line for line in said) == 2:
                began.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert began.wait(60), said
    process.send_signal(which)
    assert process.wait(60) == 130
    listener.join()
    assert "no file is half-written, and the same command goes on from here" in "".join(said)
    done = sorted(path.name for path in out.iterdir())
    assert 1 <= len(done) < 20 and all(name.endswith(".png") and not name.startswith(".") for name in done)
    for name in done:
        assert read_image(out / name).pixels.shape == (16, 24, 3)
    jobs = collect_jobs([folder], out)
    outcomes = list(mirage.Restorer(Copy(), device="cpu").run(jobs))
    assert sum(o.skipped for o in outcomes) == len(done) and all(o.error is None for o in outcomes)


# --- weights by name


def test_packaged_weights_have_names(checkpoint, tmp_path, monkeypatch):
    inside, beside = tmp_path / "package", tmp_path / "beside"
    for folder in (inside, beside):
        folder.mkdir()
    monkeypatch.setattr(loading, "weight_folders", lambda: [inside, beside, tmp_path / "absent"])
    monkeypatch.chdir(tmp_path)
    assert packaged_weights() == {}
    with pytest.raises(
        FileNotFoundError, match="no packaged weights of that name; there are: none in this installation"
    ):
        mirage.Restorer("denoise")
    for folder, name in ((inside, "denoise"), (beside, "denoise"), (beside, "derain")):
        (folder / f"{name}.safetensors").write_bytes(checkpoint.read_bytes())
    assert packaged_weights() == {
        "denoise": inside / "denoise.safetensors",
        "derain": beside / "derain.safetensors",
    }
    (inside / "features").mkdir()
    (inside / "features" / "descriptor.safetensors").write_bytes(checkpoint.read_bytes())
    assert packaged_features() == {"descriptor": resolve_weights("descriptor")} and len(packaged_weights()) == 2
    pixels = noise((16, 16, 3))
    expected = mirage.Restorer(checkpoint, device="cpu")(pixels)
    assert np.array_equal(mirage.Restorer("denoise", device="cpu")(pixels), expected)
    there = "there are: denoise, derain; of descriptors and extractors: descriptor$"
    with pytest.raises(FileNotFoundError, match=f"no file 'dehaze'.* {there}"):
        mirage.Restorer("dehaze")
    assert resolve_weights("some.pth") == Path("some.pth") and resolve_weights("a/b") == Path("a/b")
    (tmp_path / "derain").write_bytes(b"a file of the user's")
    assert resolve_weights("derain") == Path("derain")
    write_image(tmp_path / "a.png", ImageFile(pixels))
    arguments = ["restore", "a.png", "-o", "out", "--device", "cpu", "--weights"]
    assert CliRunner().invoke(main, [*arguments, "denoise"]).exit_code == 0
    assert np.array_equal(read_image(tmp_path / "out" / "a.png").pixels, expected)
    result = CliRunner().invoke(main, [*arguments, "dehaze"])
    assert result.exit_code == 1 and "there are: denoise, derain" in result.stderr


def test_where_weights_are_looked_for():
    assert loading.weight_folders() == [REPOSITORY / "mirage" / "weights", REPOSITORY / "weights"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
