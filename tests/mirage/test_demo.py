"""`mirage demo`: what it does with pictures, and its page in a real Chromium."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mirage
from mirage.cli import main
from mirage.demo.session import Limits, Refused, Studio, preview
from mirage.images import ImageFile, read_image, write_image

pytest.importorskip("PIL", reason="needs the extra 'demo'")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    mirage.save_checkpoint(mirage.MIRAGE(dim=12, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1), path)
    return path


@pytest.fixture
def studio(weights):
    return Studio({"small": weights}, Limits(pixels=20_000, bytes=200_000), {"device": "cpu"})


def photo(path: Path, height: int = 60, width: int = 90, channels: int = 3, dtype=np.uint8) -> Path:
    """A smooth picture with noise, and a text in its metadata."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    planes = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * (x + y)), np.ones_like(x)], -1)[..., :channels]
    noisy = planes + np.random.default_rng(0).normal(0, 0.05, planes.shape)
    pixels = (noisy.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)
    write_image(path, ImageFile(pixels, chunks=((b"tEXt", b"Author\0somebody"),)))
    return path


# --- without a page


def test_a_picture_is_restored_in_its_own_format_with_its_metadata(studio, weights, tmp_path):
    path = photo(tmp_path / "a.png", dtype=np.uint16)
    done = studio.restore(path, "small", "whole")
    (tmp_path / done.name).write_bytes(done.data)
    image = read_image(tmp_path / done.name)
    assert done.name == "a-restored.png" and (done.width, done.height) == (90, 60) and done.seconds > 0
    assert image.pixels.dtype == np.uint16 and (b"tEXt", b"Author\0somebody") in image.chunks
    expected = mirage.Restorer(weights, attention="whole", device="cpu")(read_image(path).pixels)
    assert np.array_equal(image.pixels, expected)
    assert np.array_equal(done.before, (read_image(path).pixels >> 8).astype(np.uint8))
    assert np.array_equal(done.after, (expected >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda path: photo(path, 200, 101), "This picture has 101 x 200 = 20,200 pixels; the limit is 20,000."),
        (lambda path: path.write_bytes(bytes(200_001)), "This file has 0.2 MB; the limit is 0.2 MB."),
        (lambda path: path.write_bytes(b"hello"), "This picture cannot be read: expected "),
        (lambda path: path.write_bytes(photo(path).read_bytes()[:300]), "This picture cannot be read: broken PNG"),
    ],
)  # fmt: skip
def test_what_is_not_restored_is_said_in_a_sentence(studio, tmp_path, prepare, sentence):
    path = tmp_path / "a.png"
    prepare(path)
    with pytest.raises(Refused) as error:
        studio.restore(path, "small", "whole")
    assert str(error.value).startswith(sentence) and str(error.value).endswith(".")


def test_unknown_weights_and_modes_and_failures_are_sentences(studio, tmp_path, monkeypatch):
    path = photo(tmp_path / "a.png")
    with pytest.raises(Refused, match="There are no weights called 'large'."):
        studio.restore(path, "large", "whole")
    with pytest.raises(Refused, match="There is no mode called 'half'."):
        studio.restore(path, "small", "half")
    failures = ((MemoryError(), "There is not enough memory"), (RuntimeError("boom"), "Restoring failed: boom."))
    for error, sentence in failures:
        with monkeypatch.context() as patch:
            patch.setattr(mirage, "Restorer", lambda *_, error=error, **__: lambda _: (_ for _ in ()).throw(error))
            patch.setattr(studio, "_last", None)
            with pytest.raises(Refused, match=re.escape(sentence)):
                studio.restore(path, "small", "whole")
        studio._last = None


def test_previews_are_colours_on_white_and_no_longer_than_1600_pixels():
    grey = np.full((4, 6, 2), 100, np.uint8)
    grey[..., 1] = [0, 51, 102, 153, 204, 255]
    assert preview(grey).shape == (4, 6, 3)
    assert preview(grey)[0, :, 0].tolist() == [255, 224, 193, 162, 131, 100]
    wide = preview(np.full((20, 3200, 3), 7 << 8, np.uint16))
    assert wide.shape == (10, 1600, 3) and (wide == 7).all()
    assert preview(np.array([[[-1], [0.5], [2]]], np.float32))[0, :, 0].tolist() == [0, 128, 255]


def test_the_command_names_what_is_missing(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--weights", str(tmp_path / "none.ckpt")])
    assert result.exit_code == 1
    assert "none.ckpt" in result.output or "pip install 'mirage-kernels[demo]'" in result.output
    assert "127.0.0.1" in CliRunner().invoke(main, ["demo", "--help"]).output


# --- in a browser


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def page(studio):
    """The page, served, in a Chromium; requests to other machines end the test."""
    pytest.importorskip("gradio", reason="needs the extra 'demo'")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if chromium() is None:
        pytest.skip("needs Chromium")
    from mirage.demo import serve

    served = serve(studio, port=None, block=False)
    elsewhere = []
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1200, "height": 820}, accept_downloads=True)
            tab.set_default_timeout(60_000)
            tab.on("request", lambda request: re.match(r"(http://127\.0\.0\.1|data:|blob:)", request.url)
                   or elsewhere.append(request.url))  # fmt: skip
            tab.goto(served.local_url)
            tab.wait_for_selector("#restore")
            yield tab
            browser.close()
    finally:
        served.close()
    assert not elsewhere
    assert not list(Path(tempfile.gettempdir()).glob("mirage-demo-*/*"))


def drop(tab, path: Path) -> None:
    tab.set_input_files("#picture input[type=file]", str(path))
    tab.wait_for_selector(f"#picture >> text={path.stem[:4]}")


def test_a_picture_is_dropped_restored_compared_and_downloaded(page, studio, tmp_path):
    path = photo(tmp_path / "lake.png")
    drop(page, path)
    page.click("#restore")
    page.wait_for_selector("#report >> text=90 x 60 pixels")
    pictures = page.locator("#slider img")
    pictures.nth(1).wait_for()
    assert pictures.count() == 2
    for picture in pictures.all():
        shown = "e => e.complete && e.naturalWidth === 90 && e.naturalHeight === 60"
        page.wait_for_function(shown, arg=picture.element_handle())
    assert len({picture.get_attribute("src") for picture in pictures.all()}) == 2
    assert page.get_by_text("Download").count() == 1  # the preview cannot be taken for the result
    with page.expect_download() as got:
        page.click("#download")
    assert got.value.suggested_filename == "lake-restored.png"
    got.value.save_as(tmp_path / "got.png")
    assert (tmp_path / "got.png").read_bytes() == studio.restore(path, "small", "auto").data
    if "MIRAGE_SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["MIRAGE_SCREENSHOTS"]) / "demo.png")


def test_broken_and_oversized_files_show_a_sentence_and_the_page_goes_on(page, tmp_path):
    page.click("#restore")
    page.wait_for_selector("text=Drop a picture first.")
    (tmp_path / "broken.png").write_bytes(photo(tmp_path / "x.png").read_bytes()[:300])
    photo(tmp_path / "wide.png", 101, 200)
    for name, sentence in (("broken.png", "This picture cannot be read: broken PNG"), ("wide.png", "200 x 101 =")):
        drop(page, tmp_path / name)
        page.click("#restore")
        page.wait_for_selector(f"text={sentence}")
        page.click("#picture button[aria-label='Clear'], #picture button[aria-label='Remove this file']")
    (tmp_path / "heavy.png").write_bytes(bytes(200_001))
    page.set_input_files("#picture input[type=file]", str(tmp_path / "heavy.png"))
    page.wait_for_selector("text=/maximum allowed size|limit is/i")
    if "MIRAGE_SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["MIRAGE_SCREENSHOTS"]) / "refused.png")
