"""Images too large for a limit or for the memory there is: named as that, and the others of a folder done."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from exif_blocks import chunk, jpeg, png
from golden import mirage_mini
from PIL import Image as PIL
from torch import nn

import mirage
import mirage.fast
from mirage import memory
from mirage.cli import main
from mirage.images import MAX_PIXELS, ImageError, ImageHeader, ImageTooLarge, read_header, read_image
from mirage.memory import AvailableMemory
from mirage.restore import budget, collect_jobs, needed_memory, restore_files

GIB, MIB = 1 << 30, 1 << 20
REPOSITORY = Path(__file__).resolve().parents[2]
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)


class Copy(nn.Module):
    def forward(self, x):
        return x


def claims(width: int, height: int, depth: int = 8, colours: int = 2) -> bytes:
    """A PNG whose header claims a size, with next to no data behind it."""
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg_claims(width: int, height: int) -> bytes:
    data = bytearray(jpeg(PIXELS))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def small_huge_small(folder: Path, huge: bytes = b"") -> list[Path]:
    folder.mkdir()
    (folder / "a.png").write_bytes(png(PIXELS))
    (folder / "b.png").write_bytes(huge or claims(4000, 3000))
    (folder / "c.png").write_bytes(png(PIXELS))
    return [folder]


# --- the size limit


@pytest.mark.parametrize("data", [claims(16384, 12288), jpeg_claims(16384, 12288)], ids=["png", "jpeg"])
def test_a_size_limit_is_named_as_one(data, tmp_path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ImageTooLarge) as caught:
        read_image(tmp_path / "a")
    assert str(caught.value) == (
        "too large: 16384x12288 are 201,326,592 pixels, the limit is 178,956,970 "
        "(raised by max_pixels, or --max-pixels on the command line)"
    )
    if data.startswith(b"\x89PNG"):
        with pytest.raises(ImageError, match="broken PNG"):  # the limit raised, what is missing comes to light
            read_image(tmp_path / "a", max_pixels=201_326_592)


@pytest.mark.filterwarnings("error")
def test_the_limit_is_ours_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 10)  # Pillow's would warn above 10 and refuse above 20
    for name, data in (("a.png", png(PIXELS)), ("a.jpg", jpeg(PIXELS)), ("b.png", png(PIXELS.astype(np.uint16)))):
        (tmp_path / name).write_bytes(data)
        assert read_image(tmp_path / name, max_pixels=24 * 16).pixels.shape == (24, 16, 3)
        with pytest.raises(ImageTooLarge, match="16x24 are 384 pixels, the limit is 383"):
            read_image(tmp_path / name, max_pixels=383)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(PIXELS), ImageHeader("png", 24, 16, 3, 8)),
        (png(PIXELS.astype(np.uint16)), ImageHeader("png", 24, 16, 3, 16)),
        (png(PIXELS[..., 0]), ImageHeader("png", 24, 16, 1, 8)),
        (png(np.dstack([PIXELS, PIXELS[..., 0]])), ImageHeader("png", 24, 16, 4, 8)),
        (png(PIXELS, chunk(b"tRNS", bytes(6))), ImageHeader("png", 24, 16, 4, 8)),
        (claims(5, 6, 4, 3), ImageHeader("png", 6, 5, 3, 8)),
        (jpeg(PIXELS), ImageHeader("jpeg", 24, 16, 3, 8)),
        (jpeg(PIXELS[..., 0]), ImageHeader("jpeg", 24, 16, 1, 8)),
    ],
)
def test_headers(data, expected, tmp_path) -> None:
    assert read_header(data) == expected
    if expected.height == 24:
        (tmp_path / "a").write_bytes(data)
        assert read_image(tmp_path / "a").pixels.shape == (24, 16, expected.channels)


# --- memory


def test_small_huge_small_leaves_the_small_ones_done(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: AvailableMemory(300 * MIB, "memory limit of a test"))
    model = mirage.fast.accelerate(mirage_mini().eval())
    outcomes = restore_files(model, collect_jobs(small_huge_small(tmp_path / "in"), tmp_path / "out"))
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    needed = memory.format_bytes(needed_memory(model, ImageHeader("png", 3000, 4000, 3, 8)))
    assert outcomes[1].error == (
        f"not enough memory: 4000x3000 pixels need about {needed}, 300 MiB are available (memory limit of a test); "
        "--no-check-memory tries all the same"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    (_, outcome, _) = restore_files(model, collect_jobs([tmp_path / "in"], tmp_path / "out"), check_memory=False)
    assert "broken PNG" in outcome.error  # tried


def test_what_is_kept_is_given_back_before_an_image_is_refused(tmp_path, monkeypatch) -> None:
    answers = iter([AvailableMemory(1, "before"), AvailableMemory(GIB, "after")])
    monkeypatch.setattr(budget, "available_memory", lambda: next(answers))
    released = []
    monkeypatch.setattr(budget.mirage_kernels, "release_workspace", lambda: released.append(1))
    (tmp_path / "a.png").write_bytes(png(PIXELS))
    (outcome,) = restore_files(Copy(), collect_jobs([tmp_path / "a.png"], tmp_path / "out"))
    assert outcome.error is None and released == [1]


class Starving(nn.Module):
    """Runs out of memory on images wider than 16, in PyTorch or in Python."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    def forward(self, x):
        if x.shape[3] > 16:
            if self.error is not None:
                raise self.error
            torch.empty(1 << 50)
        return x


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "RuntimeError: .*allocate.*"),
        (MemoryError(), "MemoryError: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "OutOfMemoryError: CUDA out of memory. Tried"),
    ],
    ids=["PyTorch", "Python", "GPU"],
)
def test_out_of_memory_in_one_file_leaves_the_others(error, message, tmp_path) -> None:
    jobs = collect_jobs(small_huge_small(tmp_path / "in", png(PIXELS.repeat(2, 1))), tmp_path / "out")
    outcomes = restore_files(Starving(error), jobs)
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert re.match(message, outcomes[1].error, re.S)


def test_a_decoder_that_runs_out_of_memory_is_no_broken_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mirage.images.png.decode_png", lambda data: (_ for _ in ()).throw(MemoryError()))
    (tmp_path / "a.png").write_bytes(png(PIXELS))
    (outcome,) = restore_files(Copy(), collect_jobs([tmp_path / "a.png"], tmp_path / "out"))
    assert outcome.error == "MemoryError: out of memory"


MEASURE = """
import json, sys
sys.path[:0] = [{benchmarks!r}, {tests!r}]
import numpy as np, torch
from golden import mirage_mini
from peak_memory import PeakMemory
import mirage, mirage.fast, mirage_kernels
from mirage.images import ImageHeader
from mirage.restore import needed_memory, restore_array
torch.set_num_threads(2)
model = mirage_mini().eval()
if {fast}:
    mirage.fast.accelerate(model)
pixels = np.random.default_rng(0).integers(0, 256, (640, 448, 3), dtype=np.uint8)
restore_array(model, pixels[:64, :64])
mirage_kernels.release_workspace()
with PeakMemory() as memory:
    restore_array(model, pixels)
print(json.dumps([memory.risen, needed_memory(model, ImageHeader("png", *pixels.shape, 8))]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "reference"])
def test_the_estimate_covers_what_is_taken(fast) -> None:
    if fast and not _native():
        pytest.skip("the C++ library is not built")
    code = MEASURE.format(benchmarks=str(REPOSITORY / "benchmarks"), tests=str(REPOSITORY / "tests"), fast=fast)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    taken, estimated = json.loads(done.stdout)
    assert taken <= estimated <= 2 * taken


def test_what_the_estimate_depends_on() -> None:
    def needed(model, *size: int, channels: int = 3, depth: int = 8) -> int:
        return needed_memory(model, ImageHeader("png", *size, channels, depth))

    fast, reference = mirage.fast.accelerate(mirage_mini()), mirage_mini()
    assert needed(Copy(), 100, 100) == 10_000 * (84 + 3 * 8)
    assert needed(Copy(), 100, 100, depth=16) == 10_000 * (84 + 6 * 8)
    assert needed(Copy(), 100, 100, channels=4) == 10_000 * (84 + 4 * 8 + 64)
    assert needed(fast, 100, 100) == needed(Copy(), 100, 100) + 10_000 * 12 * 27 + 8 * MIB
    assert needed(fast.bfloat16(), 100, 100) == needed(Copy(), 100, 100) + 5_000 * 12 * 27 + 8 * MIB
    assert needed(reference, 100, 100) == needed(Copy(), 100, 100) + 10_000 * 12 * 250
    assert needed(reference, 3000, 4000) == needed(Copy(), 3000, 4000) + 12_000_000 * 12 * 160 + 320 * MIB
    assert needed(nn.DataParallel(reference), 100, 100) == needed(reference, 100, 100)
    assert needed(reference.to("meta"), 100, 100) == needed(Copy(), 100, 100)  # not this machine's memory


def _native() -> bool:
    import mirage_kernels

    return mirage_kernels.available()["cpp"] == "yes"


# --- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mini.safetensors"
    mirage.save_checkpoint(mirage_mini(), path)
    return path


def test_the_command_refuses_by_size_and_goes_on(weights, tmp_path) -> None:
    small_huge_small(tmp_path / "in", claims(16384, 12288))
    common = [
        "restore",
        str(tmp_path / "in"),
        "--weights",
        str(weights),
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "out"),
        "--overwrite",
    ]
    result = CliRunner().invoke(main, common)
    assert result.exit_code == 1 and "restored 2 of 3" in result.output
    assert f"failed: {tmp_path / 'in' / 'b.png'}: too large: 16384x12288 are" in result.stderr
    result = CliRunner().invoke(main, [*common, "--max-pixels", "300"])
    assert result.exit_code == 1 and "restored 0 of 3" in result.output
    result = CliRunner().invoke(main, [*common, "--max-pixels", "999999999", "--no-check-memory"])
    assert result.exit_code == 1 and "restored 2 of 3" in result.output and "broken PNG" in result.stderr
    assert f"[default: {MAX_PIXELS}]" in " ".join(CliRunner().invoke(main, ["restore", "--help"]).output.split())


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of PyTorch takes more address space by itself")
@pytest.mark.skipif(sys.platform != "linux", reason="needs an address-space limit that can be asked for")
@pytest.mark.parametrize("which", ["--fast", "--reference"])
def test_the_command_under_a_real_limit(which, weights, tmp_path) -> None:
    small_huge_small(tmp_path / "in", png(np.zeros((3000, 4000, 3), np.uint8)))
    command = f'ulimit -v {3 << 20} && exec "{sys.executable}" -m mirage.cli "$@"'
    arguments = [
        tmp_path / "in",
        "--weights",
        weights,
        "--device",
        "cpu",
        "--threads",
        "2",
        "-o",
        tmp_path / "out",
        which,
        "--attention",
        "whole",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        ["bash", "-c", command, "mirage", "restore", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    assert "restored 2 of 3" in done.stdout
    said = re.search(
        r"b\.png: not enough memory: 4000x3000 pixels need about ([\d.]+) GiB, ([\d.]+ [GM]iB) are available "
        r"\(address-space limit \(ulimit -v\), 3\.0 GiB\)",
        done.stderr,
    )
    assert said and float(said[1]) > 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_the_command_names_what_it_skips_and_notes(weights, tmp_path) -> None:
    from exif_blocks import ASCII, ORIENTATION, block, entry, exif_segment

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(PIXELS, exif_segment(block([entry(ORIENTATION, ASCII, b"6\0")]))))
    (folder / "._a.jpg").write_bytes(bytes.fromhex("00051607") + bytes(60))
    (folder / "b.bmp").write_bytes(b"BM")
    arguments = ["restore", str(folder), "--weights", str(weights), "--device", "cpu", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "restored 1 of 1" in result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("restoring")]
    assert f"note: {folder / 'a.jpg'}: EXIF orientation not read: expected one number, got type 2, 2 values" in lines
    sidecar, other = f"{folder / '._a.jpg'} (an AppleDouble sidecar)", f"{folder / 'b.bmp'} (a format that is not read)"
    assert lines[-1] == f"skipped 2 in folders: {sidecar}, {other}"
    for n in range(9):
        (folder / f"{n}.gif").write_bytes(b"GIF")
    last = CliRunner().invoke(main, arguments).stderr.splitlines()[-1]
    assert last.endswith("3.gif (a format that is not read), and 6 more")
