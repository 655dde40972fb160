"""Restoring image files: sizes, bit depths, colours, and what happens when a file is bad."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image as PIL
from torch import nn

import mirage
from mirage.images import KNOWN, ImageError, ImageFile, read_image, write_image
from mirage.restore import collect_jobs, fill_hidden, load_model, pad_to_multiple, restore_array, restore_files

SIZES = [(1, 1), (7, 9), (8, 8), (33, 50), (1, 40), (40, 1)]


class Copy(nn.Module):
    """Returns its input, and insists on what the network insists on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        assert x.shape[:2] == (1, 3) and x.shape[2] % 8 == 0 and x.shape[3] % 8 == 0, x.shape
        assert 0 <= x.min() and x.max() <= 1
        self.seen.append(x)
        return x


class Invert(nn.Module):
    def forward(self, x):
        return 1 - x


def noise(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, ImageFile(pixels if pixels.ndim == 3 else pixels[..., None]))
    return path


def run(model, inputs, out, format="same"):
    jobs = collect_jobs(inputs, out, format)
    return restore_files(model, jobs, format=format)


# --- arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_identity_gives_back_every_sample(size, channels, dtype):
    pixels = noise((*size, channels), dtype)
    model = Copy()
    restored = restore_array(model, pixels)
    assert restored.dtype == dtype and np.array_equal(restored, pixels)
    assert model.seen[0].shape[2:] == tuple(-(-n // 8) * 8 for n in size)


def test_all_16_bit_values_survive():
    pixels = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256, 1).repeat(3, axis=2)
    assert np.array_equal(restore_array(Copy(), pixels), pixels)


def test_the_result_is_the_model_s_and_alpha_is_not():
    pixels = noise((9, 10, 4))
    restored = restore_array(Invert(), pixels)
    visible = pixels[..., 3] > 0
    assert np.array_equal(restored[visible][:, :3], 255 - pixels[visible][:, :3])
    assert np.array_equal(restored[..., 3], pixels[..., 3])
    assert (~visible).any() and np.array_equal(restored[~visible], pixels[~visible])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("colours", [1, 3])
def test_hidden_colours_change_no_visible_pixel(colours, dtype):
    class Blur(nn.Module):
        def forward(self, x):
            self.seen = x
            return nn.functional.avg_pool2d(x, 9, 1, 4, count_include_pad=False)

    most = np.iinfo(dtype).max
    plain = np.full((24, 40, colours + 1), most // 5 * 4, dtype)
    plain[..., -1] = most
    plain[8:16, 3:17, -1] = plain[20:, 30:, -1] = 0
    hidden = plain[..., -1] == 0
    pixels = plain.copy()
    pixels[hidden, :colours] = noise((hidden.sum(), colours), dtype)
    model = Blur()
    restored = restore_array(model, pixels)
    assert np.array_equal(restored[~hidden], plain[~hidden])  # a plain area stays plain up to its edge
    assert np.array_equal(restored[hidden], pixels[hidden])
    assert model.seen.max() - model.seen.min() < 1e-6
    assert np.array_equal(restore_array(model, plain[..., :colours]), plain[..., :colours])


def test_hidden_pixels_are_filled_from_the_nearest_visible_ones():
    x = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 1, 16, 16).clone()
    hidden = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hidden[..., 4:6, 4:6] = hidden[..., 8:, 8:] = True
    filled = fill_hidden(torch.where(hidden, torch.tensor(1e6), x), hidden)
    assert torch.equal(filled[~hidden], x[~hidden])
    assert (filled[0, 0, 4:6, 4:6] - 4.5).abs().max() < 2 and 0 <= filled.min() and filled.max() <= 15
    everything = np.zeros((8, 8, 4), np.uint8)  # nothing is visible: nothing to fill from
    assert np.array_equal(restore_array(Copy(), everything), everything)


def test_grey_goes_in_as_three_channels_and_comes_back_as_their_mean():
    class Tint(nn.Module):
        def forward(self, x):
            assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
            return x * 0 + torch.tensor([0.1, 0.2, 0.9]).view(1, 3, 1, 1)

    restored = restore_array(Tint(), noise((8, 8, 1)))
    assert restored.shape == (8, 8, 1) and (restored == round(0.4 * 255)).all()


def test_values_outside_the_range_are_clipped():
    class Far(nn.Module):
        def forward(self, x):
            return torch.where(x > 0.5, 7.0, -7.0).to(x)

    assert set(np.unique(restore_array(Far(), noise((8, 8, 3))))) == {0, 255}


def test_nan_is_an_error_not_a_picture():
    class Nan(nn.Module):
        def forward(self, x):
            return x * float("nan")

    with pytest.raises(ValueError, match="not finite"):
        restore_array(Nan(), noise((8, 8, 3)))


def test_a_model_with_another_output_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="expected an image of shape .*got tuple"):
        restore_array(Pair(), noise((8, 8, 3)))


def test_padding_reflects_and_replicates_where_it_must():
    x = torch.arange(5.0).view(1, 1, 1, 5)
    padded = pad_to_multiple(x)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]  # 3 to add, 5 there: reflected
    assert (padded == padded[:, :, :1]).all() and padded.shape == (1, 1, 8, 8)  # 7 to add, 1 there: replicated
    assert pad_to_multiple(torch.arange(4.0).view(1, 1, 1, 4))[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    x = torch.rand(1, 3, 16, 8)
    assert pad_to_multiple(x) is x


# --- files


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_round_trip(tmp_path, channels, dtype):
    pixels = noise((33, 50, channels), dtype)
    source = png(tmp_path / "in.png", pixels)
    (outcome,) = run(Copy(), [source], tmp_path / "out")
    assert outcome.error is None and outcome.target == tmp_path / "out" / "in.png"
    header = outcome.target.read_bytes()[:29]
    assert header[24] == 8 * np.dtype(dtype).itemsize  # bit depth, and colour type, as in the input
    assert header[25] == {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    assert np.array_equal(read_image(outcome.target).pixels, pixels)


def test_16_bit_rgb_agrees_with_an_independent_decoder(tmp_path):
    pixels = noise((7, 9, 3), np.uint16)
    (outcome,) = run(Invert(), [png(tmp_path / "a.png", pixels)], tmp_path / "out")
    assert np.array_equal(imagecodecs.png_decode(outcome.target.read_bytes()), 65535 - pixels)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_as_files(tmp_path, size):
    pixels = noise((*size, 3))
    (outcome,) = run(Copy(), [png(tmp_path / "a.png", pixels)], tmp_path / "out")
    assert np.array_equal(read_image(outcome.target).pixels, pixels)


def test_a_real_network_takes_every_size(tmp_path):
    torch.manual_seed(0)
    model = mirage.MIRAGE(dim=12, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2)).eval()
    files = [png(tmp_path / f"{h}x{w}.png", noise((h, w, 3))) for h, w in SIZES]
    outcomes = run(model, files, tmp_path / "out")
    assert [o.error for o in outcomes] == [None] * len(SIZES)
    assert [read_image(o.target).pixels.shape for o in outcomes] == [(h, w, 3) for h, w in SIZES]


def jpeg(path: Path, pixels: np.ndarray, **options) -> Path:
    PIL.fromarray(pixels).save(path, "JPEG", quality=100, subsampling=0, **options)
    return path


def test_jpeg_keeps_profile_and_applies_orientation(tmp_path):
    ramp = np.zeros((16, 24, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 24)
    exif = PIL.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # rotate by 90 degrees clockwise to view
    source = jpeg(tmp_path / "a.jpg", ramp, exif=exif, icc_profile=b"a profile")
    (outcome,) = run(Copy(), [source], tmp_path / "out")
    assert outcome.error is None
    with PIL.open(outcome.target) as result:
        assert result.format == "JPEG" and result.size == (16, 24)
        assert 0x0112 not in result.getexif() and result.getexif()[0x010F] == "maker"
        assert result.info["icc_profile"] == b"a profile"
        assert np.abs(np.asarray(result)[..., 0].astype(int) - np.rot90(ramp[..., 0], -1)).max() < 8


def test_grey_and_cmyk_jpeg(tmp_path):
    jpeg(tmp_path / "grey.jpg", np.full((9, 9), 100, np.uint8))
    PIL.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    outcomes = run(Copy(), [tmp_path / "grey.jpg", tmp_path / "cmyk.jpg"], tmp_path / "out")
    assert [o.error for o in outcomes] == [None, None]
    assert [read_image(o.target).pixels.shape[2] for o in outcomes] == [1, 3]


def test_formats_convert(tmp_path):
    wide = noise((8, 8, 3), np.uint16)
    source = png(tmp_path / "a.png", wide)
    (outcome,) = run(Copy(), [source], tmp_path / "out", "jpeg")
    assert outcome.target.name == "a.jpg" and read_image(outcome.target).format == "jpeg"
    expected = np.rint(wide / 257.0)
    assert np.abs(read_image(outcome.target).pixels - expected).mean() < 12
    source = jpeg(tmp_path / "b.jpeg", noise((8, 8, 3)))
    (outcome,) = run(Copy(), [source], tmp_path / "out", "png")
    assert outcome.target.name == "b.png"
    assert np.array_equal(read_image(outcome.target).pixels, read_image(source).pixels)
    (outcome,) = run(Copy(), [source], tmp_path / "out", "jpeg")
    assert outcome.target.name == "b.jpeg"


def test_alpha_does_not_fit_a_jpeg(tmp_path):
    (outcome,) = run(Copy(), [png(tmp_path / "a.png", noise((8, 8, 4)))], tmp_path / "out", "jpeg")
    assert "alpha" in outcome.error and not outcome.target.exists()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colour_description_of_a_png_is_kept(tmp_path, dtype):
    gamma = (b"gAMA", struct.pack(">I", 45455))
    size = (b"pHYs", struct.pack(">IIB", 2835, 2835, 1))
    image = ImageFile(noise((8, 8, 3), dtype), chunks=(gamma, size))
    write_image(tmp_path / "a.png", image)
    (outcome,) = run(Copy(), [tmp_path / "a.png"], tmp_path / "out")
    assert read_image(outcome.target).chunks == (gamma, size)
    with PIL.open(outcome.target) as result:
        result.load()
        assert result.info["gamma"] == pytest.approx(0.45455) and result.info["dpi"][0] == pytest.approx(72, abs=0.1)


def test_a_jpeg_s_profile_reaches_the_png(tmp_path):
    source = jpeg(tmp_path / "a.jpg", noise((8, 8, 3)), icc_profile=b"a profile")
    (outcome,) = run(Copy(), [source], tmp_path / "out", "png")
    with PIL.open(outcome.target) as result:
        assert result.info["icc_profile"] == b"a profile"


def test_palettes_transparency_and_bilevel(tmp_path):
    rgb = PIL.fromarray(noise((9, 9, 3)))
    rgb.quantize(16).save(tmp_path / "palette.png")
    rgb.quantize(16).save(tmp_path / "see_through.png", transparency=0)
    rgb.save(tmp_path / "key.png", transparency=tuple(np.asarray(rgb)[0, 0].tolist()))
    rgb.convert("1").save(tmp_path / "bits.png")
    names = ["palette.png", "see_through.png", "key.png", "bits.png"]
    outcomes = run(Copy(), [tmp_path / name for name in names], tmp_path / "out")
    assert [o.error for o in outcomes] == [None] * 4
    pixels = [read_image(o.target).pixels for o in outcomes]
    assert [p.shape[2] for p in pixels] == [3, 4, 4, 1]
    assert pixels[2][0, 0, 3] == 0 and pixels[2][..., 3].max() == 255
    with PIL.open(tmp_path / "palette.png") as source:
        assert np.array_equal(pixels[0], np.asarray(source.convert("RGB")))
    assert set(np.unique(pixels[3])) <= {0, 255}


# --- bad files


def test_a_bad_file_does_not_stop_the_others(tmp_path):
    good = png(tmp_path / "good.png", noise((8, 8, 3)))
    wide = png(tmp_path / "wide.png", noise((64, 64, 3), np.uint16))
    bad = {
        "truncated.png": good.read_bytes()[:60],
        "truncated16.png": wide.read_bytes()[:9000],
        "flipped16.png": wide.read_bytes()[:500] + b"\xff" * 8 + wide.read_bytes()[508:],
        "truncated.jpg": jpeg(tmp_path / "x.jpg", noise((64, 64, 3))).read_bytes()[:900],
        "empty.png": b"",
        "text.png": b"hello, I am not an image",
        "header.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    inputs = [*(tmp_path / name for name in bad), tmp_path / "missing.png", good]
    outcomes = run(Copy(), inputs, tmp_path / "out")
    errors = {o.source.name: o.error for o in outcomes}
    assert errors.pop("good.png") is None
    assert all(errors.values()), errors
    assert f"expected {KNOWN}, got an empty file" in errors["empty.png"]
    assert f"expected {KNOWN}" in errors["text.png"]
    assert "broken PNG" in errors["truncated16.png"] and "broken JPEG" in errors["truncated.jpg"]
    assert "no such file" in errors["missing.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.png"]


def test_a_model_that_fails_on_one_file_is_reported(tmp_path):
    class Picky(nn.Module):
        def forward(self, x):
            if x.shape[3] > 8:
                raise RuntimeError("out of memory")
            return x

    files = [png(tmp_path / f"{w}.png", noise((8, w, 3))) for w in (8, 16, 7)]
    seen = []
    outcomes = restore_files(Picky(), collect_jobs(files, tmp_path / "out"), on_done=seen.append)
    assert [o.error for o in outcomes] == [None, "RuntimeError: out of memory", None]
    assert seen == outcomes


def test_inputs_are_never_overwritten(tmp_path):
    a, b = png(tmp_path / "a.png", noise((8, 8, 3))), png(tmp_path / "b.png", noise((8, 8, 3)))
    before = a.read_bytes(), b.read_bytes()
    outcomes = run(Invert(), [a, b], tmp_path)
    assert all("refusing to overwrite an input" in o.error for o in outcomes)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").symlink_to(b)  # writing a's result would replace a link, writing through it would hit b
    os.link(a, out / "b.png")
    outcomes = run(Invert(), [a, b], out)
    assert all("refusing to overwrite an input" in o.error for o in outcomes)
    assert (a.read_bytes(), b.read_bytes()) == before


def test_two_inputs_with_one_output(tmp_path):
    one, two = png(tmp_path / "1" / "a.png", noise((8, 8, 3))), png(tmp_path / "2" / "a.png", noise((8, 8, 3), seed=1))
    outcomes = run(Copy(), [one, two, one], tmp_path / "out")
    assert len(outcomes) == 2 and outcomes[0].error is None and "already that of" in outcomes[1].error
    assert np.array_equal(read_image(tmp_path / "out" / "a.png").pixels, read_image(one).pixels)


def test_folders_keep_their_structure(tmp_path):
    folder = tmp_path / "photos"
    png(folder / "a.png", noise((8, 8, 3)))
    png(folder / "deep" / "b.PNG", noise((8, 8, 3)))
    (folder / "notes.txt").write_text("not an image")
    out = folder / "out"
    for _ in range(2):  # the second time the results of the first lie inside the folder and are no inputs
        outcomes = run(Copy(), [folder], out)
        assert sorted(o.target.relative_to(out).as_posix() for o in outcomes) == ["a.png", "deep/b.PNG"]
        assert all(o.error is None for o in outcomes)
    (tmp_path / "empty").mkdir()
    (outcome,) = run(Copy(), [tmp_path / "empty"], out)
    assert "no images in this folder" in outcome.error


def test_earlier_results_are_replaced_and_failures_leave_them(tmp_path, monkeypatch):
    source, out = png(tmp_path / "a.png", noise((8, 8, 3))), tmp_path / "out"
    run(Copy(), [source], out)
    first = (out / "a.png").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    (outcome,) = run(Invert(), [source], out)
    assert "disk full" in outcome.error
    monkeypatch.undo()
    assert [p.name for p in out.iterdir()] == ["a.png"] and (out / "a.png").read_bytes() == first
    run(Invert(), [source], out)
    assert np.array_equal(read_image(out / "a.png").pixels, 255 - read_image(source).pixels)


def test_results_get_ordinary_permissions(tmp_path):
    (outcome,) = run(Copy(), [png(tmp_path / "a.png", noise((8, 8, 3)))], tmp_path / "out")
    (tmp_path / "plain").write_bytes(b"")
    assert outcome.target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="format: expected same, png, jpeg, tiff, webp, avif, heic, got 'gif'"):
        collect_jobs([tmp_path], tmp_path, "gif")
    with pytest.raises(ImageError, match="format: expected one of png, jpeg, tiff, webp, avif, heic, got 'gif'"):
        write_image(tmp_path / "a.gif", ImageFile(noise((8, 8, 3))), "gif")
    with pytest.raises(ImageError, match=r"pixels: expected .* got \[8, 8, 3\] float64"):
        write_image(tmp_path / "a.png", ImageFile(np.zeros((8, 8, 3))))


# --- models


def test_load_model_reads_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = mirage.mirage_tiny().eval()
    torch.save({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "tiny.ckpt")
    loaded = load_model(tmp_path / "tiny.ckpt", fast=False)
    pixels = noise((8, 16, 3))
    assert not loaded.training
    assert np.array_equal(restore_array(loaded, pixels), restore_array(model, pixels))
    assert not np.array_equal(restore_array(loaded, pixels), pixels)


def test_read_image_takes_the_content_for_what_it_is(tmp_path):
    buffer = io.BytesIO()
    PIL.fromarray(noise((8, 8, 3))).save(buffer, "JPEG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert read_image(tmp_path / "a.png").format == "jpeg"
    PIL.fromarray(noise((8, 8, 3))).save(tmp_path / "b.bmp")
    with pytest.raises(ImageError, match=f"expected {KNOWN}, got a file that begins with 42 4d"):
        read_image(tmp_path / "b.bmp")
