"""Which files of a folder are photographs, and which others are named."""

from __future__ import annotations

import os

import numpy as np
import pytest
from exif_blocks import jpeg, png
from torch import nn

from mirage.images import KNOWN, read_image
from mirage.restore import collect_jobs, restore_files

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
SIDECAR = bytes.fromhex("000516070002000000004d6163204f532058") + bytes(64)
PNG, JPEG = png(PIXELS), jpeg(PIXELS)


class Copy(nn.Module):
    def forward(self, x):
        return x


def fill(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def look(folder, out):
    skipped: dict[str, str] = {}
    jobs = collect_jobs(
        [folder], out, on_skip=lambda path, why: skipped.update({path.relative_to(folder).as_posix(): why})
    )
    return jobs, skipped


def test_sidecars_are_skipped_with_a_reason(tmp_path) -> None:
    files = {"a.jpg": JPEG, "._a.jpg": SIDECAR, "b.png": PNG, "._b.png": SIDECAR, "._empty.jpg": b"", "c.jpg": SIDECAR}
    jobs, skipped = look(fill(tmp_path / "in", files), tmp_path / "out")
    assert [job.source.name for job in jobs] == ["a.jpg", "b.png"]
    assert skipped == dict.fromkeys(["._a.jpg", "._b.png", "._empty.jpg", "c.jpg"], "an AppleDouble sidecar")
    assert [outcome.error for outcome in restore_files(Copy(), jobs)] == [None, None]


def test_a_photograph_may_be_called_like_a_sidecar(tmp_path) -> None:
    jobs, skipped = look(fill(tmp_path / "in", {"._a.jpg": JPEG, ".b.png": PNG}), tmp_path / "out")
    assert [job.source.name for job in jobs] == ["._a.jpg", ".b.png"] and skipped == {}


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".JFIF", ".Jpe", ".pjpeg"])
def test_suffixes_of_jpeg(suffix, tmp_path) -> None:
    jobs, _ = look(fill(tmp_path / "in", {f"a{suffix}": JPEG}), tmp_path / "out")
    (outcome,) = restore_files(Copy(), jobs)
    assert outcome.error is None and outcome.target == tmp_path / "out" / f"a{suffix}"
    assert read_image(outcome.target).format == "jpeg"
    (job,) = collect_jobs([tmp_path / "in"], tmp_path / "out", "jpeg")
    assert job.target.name == f"a{suffix}"
    (job,) = collect_jobs([tmp_path / "in"], tmp_path / "out", "png")
    assert job.target.name == "a.png"


def test_what_looks_like_a_picture_is_named_and_the_rest_is_not(tmp_path) -> None:
    files = {
        "a.png": PNG,
        "b.bmp": b"BM",
        "deep/c.GIF": b"GIF89a",
        "d.dng": b"II*\0",
        "e.jxl": JPEG,
        "f": JPEG,
        "notes.txt": b"text",
        "README": b"text",
        "a.png.json": b"{}",
        "copy.png.bak": PNG,
    }
    folder = fill(tmp_path / "in", files)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "gone.dng").symlink_to(tmp_path / "nowhere")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "here.png").symlink_to(folder / "a.png")
    (folder / "other").symlink_to(tmp_path)
    (folder / "folder.png").mkdir()
    jobs, skipped = look(folder, tmp_path / "out")
    assert [job.source.name for job in jobs] == ["a.png", "here.png"]
    other, link = "a format that is not read", "a link to nothing"
    assert skipped == {
        "b.bmp": other,
        "d.dng": other,
        "deep/c.GIF": other,
        "e.jxl": other,
        "f": "an image without the suffix of one",
        "gone.dng": link,
        "gone.jpg": link,
        "other": "a link to a folder",
    }


def test_a_broken_photograph_is_reported_not_skipped(tmp_path) -> None:
    jobs, skipped = look(fill(tmp_path / "in", {"a.jpg": b"", "b.png": b"GIF89a", "c.png": JPEG}), tmp_path / "out")
    assert skipped == {}
    errors = [outcome.error for outcome in restore_files(Copy(), jobs)]
    assert errors == [
        f"expected {KNOWN}, got an empty file",
        f"expected {KNOWN}, got a file that begins with 47 49 46 38 39 61",
        None,  # a JPEG, whatever its name says
    ]


def test_a_folder_of_sidecars_has_no_photographs(tmp_path) -> None:
    (job,), skipped = look(fill(tmp_path / "in", {"._a.jpg": SIDECAR}), tmp_path / "out")
    assert job.error == "no images in this folder" and list(skipped) == ["._a.jpg"]


def test_files_given_by_name_are_never_skipped(tmp_path) -> None:
    folder = fill(tmp_path / "in", {"._a.jpg": SIDECAR})
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    jobs = collect_jobs([folder / "._a.jpg", folder / "gone.jpg"], tmp_path / "out")
    errors = [outcome.error for outcome in restore_files(Copy(), jobs)]
    assert errors == [f"expected {KNOWN}, got an AppleDouble sidecar, which has no picture", "a link to nothing"]


def test_earlier_results_are_neither_inputs_nor_skipped(tmp_path) -> None:
    folder = fill(tmp_path / "in", {"a.png": PNG, "out/b.png": PNG, "out/c.tif": b""})
    jobs, skipped = look(folder, folder / "out")
    assert [job.source.name for job in jobs] == ["a.png"] and skipped == {}
    os.rename(folder / "out", tmp_path / "elsewhere")
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    jobs, _ = look(folder, folder / "out")
    assert [job.source.name for job in jobs] == ["a.png"]
