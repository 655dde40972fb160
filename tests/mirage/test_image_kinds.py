"""Depths, channels, kinds of TIFF, colours, sizes, missing libraries, and metadata that cannot be read."""

from __future__ import annotations

import io
import struct
import sys

import imagecodecs
import numpy as np
import pytest
import tifffile
from exif_blocks import (
    ORIENTATION,
    SHORT,
    block,
    chunk,
    entry,
    photograph,
    png,
    png_chunks,
)
from picture_files import ICC, XMP, farthest, profile_of, saved, scene, seen, stored, tiff
from PIL import Image as PIL

from mirage.images import (
    FORMAT_SPECS,
    FORMATS,
    ImageError,
    ImageFile,
    ImageTooLarge,
    check_writable,
    decode_image,
    encode_image,
    encode_with_notes,
    read_header,
)
from mirage.images.boxes import add_metadata, read_heif

# --- depths and kinds


def deep(bits: int) -> np.ndarray:
    """Every other code of so many bits, in three channels."""
    codes = np.arange(32 * 48).reshape(32, 48) * ((1 << bits) - 1) // (32 * 48 - 1)
    return np.stack([codes, codes[::-1], codes[:, ::-1]], 2).astype(np.uint16)


@pytest.mark.parametrize("bits", [10, 12])
def test_ten_and_twelve_bits_stay_what_they_are(bits) -> None:
    data = imagecodecs.avif_encode(deep(bits), level=100, bitspersample=bits)
    image = decode_image(data)
    most = (1 << bits) - 1
    assert image.depth == bits and image.pixels.dtype == np.uint16
    assert np.array_equal(image.pixels, np.rint(deep(bits) * (65535 / most)))
    for target in ("avif", "heic"):
        written, notes = encode_with_notes(image, target, quality=100)
        assert notes == () and read_heif(written).depth_and_channels() == (bits, 3)
        assert np.array_equal(decode_image(written).pixels, image.pixels)
    assert np.array_equal(imagecodecs.avif_decode(encode_image(image, "avif", quality=100)), deep(bits))
    assert np.array_equal(imagecodecs.png_decode(encode_image(image, "png")), image.pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_depths_and_channels_in_every_format(target, dtype, channels) -> None:
    full = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    pixels = np.random.default_rng(0).random((24, 20, channels), np.float32)
    pixels[0] = [[0] * channels, [1] * channels] * 10
    pixels = pixels if dtype is np.float32 else np.rint(pixels * full).astype(dtype)
    if target == "jpeg" and channels in (2, 4):
        with pytest.raises(ImageError, match="a JPEG has no alpha channel"):
            encode_image(ImageFile(pixels), target)
        with pytest.raises(ImageError, match="a JPEG has no alpha channel"):
            check_writable(target, channels)
        return
    data, notes = encode_with_notes(ImageFile(pixels), target, quality=100)
    image = decode_image(data)
    given = {np.uint8: 8, np.uint16: 16, np.float32: 32}[dtype]
    bits = {"jpeg": 8, "webp": 8, "heic": min(given, 10), "avif": min(given, 12), "png": min(given, 16)}.get(
        target, given
    )
    expected_notes = []
    if bits < given:
        what = "float32" if given == 32 else "16 bits"
        expected_notes.append(f"samples of {what} rounded to {bits} bits, for {FORMAT_SPECS[target].title}")
    grey = channels <= 2
    if grey and target == "webp":
        expected_notes.append("grey written as RGB: WebP has no grey")
        pixels = np.concatenate([pixels[..., [0] * 3], pixels[..., 1:]], 2)
    assert list(notes) == expected_notes and image.notes == ()
    header = read_header(data)
    assert (header.height, header.width, header.channels) == image.pixels.shape == pixels.shape
    assert header.depth == image.pixels.dtype.itemsize * 8
    scale = 1 if image.pixels.dtype == np.float32 else np.iinfo(image.pixels.dtype).max
    error = np.abs(image.pixels / np.float64(scale) - pixels / np.float64(full)).max()
    if target != "jpeg":
        steps = 0.5 / ((1 << bits) - 1) + (0.5 / 65535 if 8 < bits < 16 else 0)  # rounded to bits, and read as 16
        assert error <= (0 if bits == given else steps + 2**-24)  # and float32's own rounding


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("scheme", [None, "lzw", "zlib"])
def test_tiff_keeps_bytes_depth_and_compression(scheme, dtype, order) -> None:
    pixels = (
        scene() / np.float32(255) if dtype is np.float32 else scene().astype(dtype) * (257 if dtype is np.uint16 else 1)
    )
    image = decode_image(tiff(pixels, compression=scheme, byteorder=order, predictor=scheme is not None))
    assert np.array_equal(image.pixels, pixels) and image.notes == ()
    with tifffile.TiffFile(io.BytesIO(encode_image(image))) as written:
        page = written.pages[0]
        assert np.array_equal(page.asarray(), pixels) and page.dtype == dtype and len(written.pages) == 1
        assert int(page.compression) == {None: 1, "lzw": 5, "zlib": 8}[scheme]


def test_kinds_of_tiff() -> None:
    grey, rgba = scene()[..., 0], np.dstack([scene(), scene()[..., 0]])
    colours = PIL.fromarray(scene())
    palette, bilevel = colours.convert("P"), colours.convert("1")
    exact = {
        "tiles": (tiff(scene(), tile=(16, 16)), scene()),
        "planes": (tiff(scene().transpose(2, 0, 1), planarconfig="separate"), scene()),
        "white is zero": (tiff(grey, photometric="miniswhite"), 255 - grey[..., None]),
        "alpha": (tiff(rgba, extrasamples=["unassalpha"]), rgba),
        "16-bit grey": (tiff(grey.astype(np.uint16) * 257, photometric="minisblack"), grey[..., None] * np.uint16(257)),
        "palette": (saved(palette, "tiff"), np.asarray(palette.convert("RGB"))),
        "bilevel": (saved(bilevel, "tiff", compression="group4"), np.asarray(bilevel.convert("L"))[..., None]),
        "YCbCr": (saved(colours.convert("YCbCr"), "tiff"), np.asarray(colours.convert("YCbCr").convert("RGB"))),
        "BigTIFF": (tiff(scene(), bigtiff=True), scene()),
    }
    for name, (data, expected) in exact.items():
        image = decode_image(data)
        assert np.array_equal(image.pixels, expected) and image.notes == (), name
    noted = {
        "2 pictures: the first alone is read": tiff(np.stack([scene(), 255 - scene()])),
        "1 further channel left out: not transparency": tiff(rgba, extrasamples=["unspecified"]),
    }
    for note, data in noted.items():
        image = decode_image(data)
        assert image.notes == (note,) and np.array_equal(image.pixels, scene())
    multiplied = np.dstack([np.full((4, 4, 3), 60, np.uint8), np.full((4, 4), 120, np.uint8)])
    image = decode_image(tiff(multiplied, extrasamples=["assocalpha"]))
    assert np.array_equal(image.pixels[0, 0], [128, 128, 128, 120]) and "divided by" in image.notes[0]


REFUSED = {
    "a camera's raw file": lambda: tiff(scene(), extratags=[(50706, 1, 4, b"\1\4\0\0", True)]),
    "samples of 32 bits is not read": lambda: tiff(scene().astype(np.uint32)),
    r"samples from 0 to 255: expected 0 to 1": lambda: tiff(scene().astype(np.float32)),
    "expected 0 to 1": lambda: tiff(np.full((4, 4, 3), np.nan, np.float32)),
    r"CIE L\*a\*b\*": lambda: saved(PIL.new("LAB", (4, 4)), "tiff"),
    "image file is truncated": lambda: tiff(scene(), compression="zlib")[:-9],
    "broken TIFF: it does not say": lambda: b"II*\0\x10\0\0\0CR" + bytes(50),
    r"broken WebP: image file is truncated": lambda: saved(stored(1), "webp")[:-9],
    "broken AVIF": lambda: saved(stored(1), "avif")[:-9],
    r"broken HEIF: it ends before": lambda: saved(stored(1), "heic")[:40],
    "an AVIF sequence": lambda: saved(stored(1), "avif", save_all=True, append_images=[stored(1)]),
    "expected PNG, JPEG, TIFF, WebP, AVIF or HEIC": lambda: b"\0\0\0\x18ftypisom" + bytes(20),
}


@pytest.mark.parametrize(("message", "data"), REFUSED.items(), ids=REFUSED)
def test_refusals_name_what_it_is(message, data) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data())


def test_tiffs_without_some_of_their_strips_are_refused_not_black() -> None:
    data = tiff(scene(), metadata=None, rowsperstrip=8)
    assert np.array_equal(decode_image(data).pixels, scene())
    for tag, message in ((273, "0 strips or tiles of 4"), (278, "4 strips or tiles of 32")):
        at = data.index(struct.pack("<H", tag), struct.unpack_from("<I", data, 4)[0])
        kind, count = struct.unpack_from("<HI", data, at + 2)
        broken = struct.pack("<HHI", 60000, kind, count) if tag == 273 else struct.pack("<HHIH", tag, kind, count, 1)
        with pytest.raises(ImageError, match=message):
            decode_image(data[:at] + broken + data[at + len(broken) :])


def test_grids_of_tiles_are_one_picture() -> None:
    y, x = np.mgrid[0:200, 0:150]
    pixels = np.stack([x, y, 255 - x - y // 4], 2).clip(0, 255).astype(np.uint8)
    turn = block([entry(ORIENTATION, SHORT, b"\6\0")])
    data = saved(PIL.fromarray(pixels), "heic", quality=95, chroma=444, tile_size=64, icc_profile=ICC, exif=turn)
    assert len(read_heif(data).items) > 10
    header, image = read_header(data), decode_image(data)
    assert (header.format, header.height, header.width, header.channels) == ("heic", 200, 150, 3)
    assert farthest(image.pixels, np.rot90(pixels, -1)) <= 4 and image.icc_profile == ICC and image.notes == ()


def test_animations_are_read_by_their_first_picture() -> None:
    frames = saved(stored(1), "webp", save_all=True, append_images=[PIL.new("RGB", (48, 32))], lossless=True)
    image = decode_image(frames)
    assert np.array_equal(image.pixels, scene()) and image.notes == ("an animation: its first picture alone is read",)


def test_lossless_webp_stays_so() -> None:
    image = decode_image(saved(stored(1), "webp", lossless=True))
    assert np.array_equal(seen(encode_image(image, quality=50)), scene())
    assert farthest(seen(encode_image(ImageFile(scene()), "webp", quality=50)), scene()) > 4
    assert np.array_equal(seen(encode_image(ImageFile(scene()), "webp", quality=100)), scene())


# --- sizes, libraries


def test_sizes_are_refused_before_anything_is_decoded() -> None:
    def patched(data: bytes, old: bytes, new: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    size = struct.pack(">II", 48, 32), struct.pack(">II", 60_000, 50_000)
    tags = [struct.pack("<HHII", tag, 4, 1, n) for tag, n in ((256, 48), (257, 32), (256, 10**6), (257, 10**6))]
    canvas = saved(PIL.fromarray(np.dstack([scene(), scene()[..., 0]])), "webp", icc_profile=ICC)
    bombs = [
        patched(saved(stored(1), "avif"), size[0], size[1]),
        patched(patched(tiff(scene(), metadata=None), tags[0], tags[2]), tags[1], tags[3]),
        patched(canvas, b"\x2f\0\0\x1f\0\0", b"\xff\xff\0\xff\xff\0"),
    ]
    for data in bombs:
        with pytest.raises(ImageTooLarge, match="the limit is 178,956,970"):
            decode_image(data)
    for format, most in (("webp", 16_383), ("jpeg", 65_500)):
        with pytest.raises(ImageError, match=f"at most {most} pixels a side"):
            encode_image(ImageFile(np.zeros((1, most + 1, 3), np.uint8)), format)


@pytest.mark.parametrize(
    ("module", "format", "extra"),
    [("pillow_heif", "heic", "heif"), ("tifffile", "tiff", "images"), ("PIL", "webp", "images")],
)
def test_a_missing_library_is_named_with_its_extra(module, format, extra, monkeypatch) -> None:
    data = encode_image(ImageFile(scene()), format)
    monkeypatch.setitem(sys.modules, module, None)
    message = (
        f"{FORMAT_SPECS[format].title} needs {module}, not installed; try: pip install 'mirage-kernels\\[{extra}\\]'"
    )
    with pytest.raises(ImageError, match=message):
        decode_image(data)
    with pytest.raises(ImageError, match=message):
        encode_image(ImageFile(scene()), format)


def test_a_library_built_without_a_format_is_no_broken_file(monkeypatch) -> None:
    data = encode_image(ImageFile(scene()), "avif")

    def missing(*_, **__):
        raise ImportError("could not import name 'avif_decode'")

    monkeypatch.setattr(imagecodecs, "avif_decode", missing)
    with pytest.raises(ImageError, match="AVIF cannot be read or written here: could not import name 'avif_decode'"):
        decode_image(data)


# --- colours


@pytest.mark.parametrize("target", FORMATS)
def test_profiles_of_other_colours_are_left_out(target) -> None:
    grey = ImageFile(scene()[..., :1], icc_profile=profile_of(b"GRAY"))
    data, notes = encode_with_notes(grey, target)
    carried = decode_image(data).icc_profile
    if target == "webp":
        assert carried is None and notes[1] == "colour profile left out: it is for GRAY, and the picture is RGB"
    else:
        assert carried == grey.icc_profile and notes == ()
    data, notes = encode_with_notes(ImageFile(scene(), icc_profile=profile_of(b"CMYK")), target)
    assert decode_image(data).icc_profile is None and "it is for CMYK" in notes[0]


def test_colours_said_by_number_are_carried_where_they_can_be() -> None:
    image = ImageFile(scene(), "avif", cicp=(9, 16))  # BT.2020, PQ
    for target in ("avif", "heic", "png"):
        data, notes = encode_with_notes(image, target, quality=100)
        assert notes == () and decode_image(data).cicp == (9, 16)
        assert farthest(decode_image(data).pixels, scene()) == 0
    assert dict(png_chunks(encode_image(image, "png")))[b"cICP"] == bytes([9, 16, 0, 1])
    for target in ("jpeg", "tiff", "webp"):
        _, notes = encode_with_notes(image, target)
        assert notes == (
            f"colours left unsaid: {FORMAT_SPECS[target].title} cannot say primaries 9, transfer function 16",
        )


def grey_inks() -> bytes:
    """A colour profile by which every mixture of inks is one middle grey (L* 53.7), but for black ink."""
    fixed = [struct.pack(">i", round(number * 65536)) for number in (1, 0, 0, 0, 1, 0, 0, 0, 1)]
    ramps = bytes(range(256))
    table = (
        b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + b"".join(fixed)
        + ramps * 4
        + bytes([137, 128, 128, 0, 128, 128]) * 8
        + ramps * 3
    )
    white = b"".join(struct.pack(">i", round(number * 65536)) for number in (0.9642, 1, 0.8249))
    tags = {b"A2B0": table, b"wtpt": b"XYZ " + bytes(4) + white}
    at, packed, listed = 132 + 12 * len(tags), b"", b""
    for name, body in tags.items():
        listed += name + struct.pack(">II", at + len(packed), len(body))
        packed += body + bytes(-len(body) % 4)
    header = struct.pack(">I4sI4s4s4s12s4s28s12s48s", at + len(packed), b"", 0x02400000, b"prtr", b"CMYK", b"Lab ",
                         bytes(12), b"acsp", b"", white, b"")  # fmt: skip
    return header + struct.pack(">I", len(tags)) + listed + packed


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_cmyk_becomes_srgb_by_its_profile(format) -> None:
    image = decode_image(saved(PIL.new("CMYK", (9, 9), (0, 255, 255, 0)), format, icc_profile=grey_inks()))
    assert farthest(image.pixels, np.full((9, 9, 3), 128)) <= 1
    assert image.icc_profile is None and image.notes == ("CMYK made sRGB by the file's colour profile",)


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_cmyk_says_how_it_became_rgb(format) -> None:
    cmyk = PIL.new("CMYK", (9, 9), (0, 255, 255, 0))
    image = decode_image(saved(cmyk, format))
    assert farthest(image.pixels, np.full((9, 9, 3), (255, 0, 0))) <= 3
    assert image.notes == ("CMYK made RGB without a colour profile: its colours are approximate",)
    image = decode_image(saved(cmyk, format, icc_profile=profile_of(b"CMYK")))  # nothing behind its header
    assert image.icc_profile is None and "without a colour profile" in image.notes[0]


# --- no metadata decides over the pixels


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("given", ["webp", "avif", "heic", "tiff"])
def test_metadata_that_cannot_be_read_leaves_the_picture(given, target) -> None:
    odd = {"exif": b"nonsense", "xmp": b"<x \xff\xfe", "icc_profile": b"no profile"}
    if given == "tiff":
        data = tiff(scene(), iccprofile=odd["icc_profile"], extratags=[(700, 1, len(odd["xmp"]), odd["xmp"], True)])
        data = data.replace(struct.pack("<HHI", 0x0131, 2, 12), struct.pack("<HHI", 0x0131, 2, 1 << 30))  # Software
    elif given == "webp":
        data = saved(stored(1), "webp", lossless=True, **odd)
    else:
        data = add_metadata(saved(stored(1), given, quality=95), *odd.values())
    image = decode_image(data)
    assert farthest(image.pixels, scene()) <= 8
    assert image.xmp == odd["xmp"] and image.icc_profile == odd["icc_profile"]
    if given == "tiff":
        assert image.notes == ("EXIF left out in part: 1 of its first entries cannot be read",)
    else:
        assert image.exif is None and image.notes == ("EXIF left out: no TIFF header, but b'nonsense'",)
    again = decode_image(encode_image(image, target))
    assert again.xmp == odd["xmp"] and again.icc_profile == odd["icc_profile"]


def test_tags_that_are_wrong_are_not_logged(caplog) -> None:
    data = tiff(scene(), software="tifffile.py", metadata=None)
    wrong = data.replace(struct.pack("<HHI", 0x0131, 2, 12), struct.pack("<HHI", 0x0131, 2, 1 << 30))
    assert np.array_equal(decode_image(wrong).pixels, scene()) and not caplog.records
    with tifffile.TiffFile(io.BytesIO(wrong)) as opened:
        assert opened.pages[0].tags and caplog.records  # others still hear it


def test_a_cut_off_chunk_of_a_webp_leaves_the_picture() -> None:
    data = saved(stored(1), "webp", lossless=True, exif=photograph(b"\1\0"), xmp=XMP)
    image = decode_image(data[:-20])
    assert np.array_equal(image.pixels, scene()) and image.exif == photograph(b"\1\0") and image.xmp is None


def test_xmp_without_room_in_a_jpeg_is_named() -> None:
    image = ImageFile(scene(), xmp=b"<x>" + bytes(70_000))
    _, notes = encode_with_notes(image, "jpeg")
    assert notes == ("XMP left out: a JPEG has room for 65,504 bytes, and it has 70,003",)
    for target in ("png", "tiff", "webp", "avif", "heic"):
        assert decode_image(encode_image(image, target)).xmp == image.xmp


@pytest.mark.parametrize("target", FORMATS)
def test_density_without_exif(target) -> None:
    data = png(scene(), chunk(b"pHYs", struct.pack(">IIB", 11811, 5906, 1)))
    with PIL.open(io.BytesIO(encode_image(decode_image(data), target))) as image:
        dpi = image.info.get("dpi") or (image.getexif()[0x011A], image.getexif()[0x011B])
        assert [round(float(number), 1) for number in dpi] == [300, 150]
