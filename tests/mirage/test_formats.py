"""Every pair of formats: pixels, orientation, metadata, written and read by other libraries than those under test."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exif_blocks import (
    ARTIST,
    ASCII,
    GPS,
    LONG,
    MAKE,
    ORIENTATION,
    SHORT,
    block,
    chunk,
    directory,
    entry,
    exif_segment,
    jpeg,
    photograph,
    png,
    png_chunks,
    segment,
)
from PIL import Image as PIL
from PIL import ImageCms, ImageOps
from torch import nn

from mirage.images import (
    FORMAT_SPECS,
    FORMATS,
    SUFFIXES,
    ImageError,
    ImageFile,
    ImageTooLarge,
    check_writable,
    decode_image,
    encode_image,
    encode_with_notes,
    read_header,
    write_image,
)
from mirage.images.boxes import add_metadata, read_heif
from mirage.restore import collect_jobs, restore_files

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")
pillow_heif = pytest.importorskip("pillow_heif")
pillow_heif.register_heif_opener()

REPOSITORY = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = REPOSITORY.parent / "shared" / "data" / "CBSD68"
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"'
    ' tiff:Orientation="6" dc:creator="José"/></rdf:RDF></x:xmpmeta>'
).encode()
TOLERANCE = {"png": 0, "jpeg": 4, "tiff": 0, "webp": 9, "avif": 8, "heic": 8}  # WebP has half the colours' resolution


def scene() -> np.ndarray:
    y, x = np.mgrid[0:32, 0:48]
    return np.stack([x * 5, y * 7, 255 - x * 3 - y], 2).clip(0, 255).astype(np.uint8)


def stored(orientation: int) -> PIL.Image:
    """What has to be stored for the scene to be seen, after Pillow's own rule."""
    undo = [
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    ]
    image = PIL.fromarray(scene())
    return image.transpose(PIL.Transpose[undo[orientation - 1]]) if undo[orientation - 1] else image


def saved(image: PIL.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"heic": "HEIF"}.get(format, format), **options)
    return buffer.getvalue()


def source(format: str, orientation: int) -> bytes:
    """A file with EXIF, XMP, a profile and 300 dpi, made without the code under test."""
    exif, image = photograph(struct.pack("<H", orientation)), stored(orientation)
    xmp = XMP.replace(b'"6"', b'"%d"' % orientation)
    if format == "jpeg":
        profile = segment(0xE2, b"ICC_PROFILE\0\1\1" + ICC)
        packet = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
        return jpeg(np.asarray(image), exif_segment(exif), profile, packet)
    if format == "png":
        packet = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        plain = saved(image, "png", icc_profile=ICC)
        return plain[:33] + chunk(b"eXIf", exif) + packet + plain[33:]
    if format == "tiff":
        tags = PIL.Exif()
        tags.load(exif)
        tags[700] = xmp
        return saved(image, "tiff", exif=tags, icc_profile=ICC)
    options = {"webp": {"lossless": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}, "heic": {"chroma": 444}}
    return saved(image, format, exif=exif, icc_profile=ICC, xmp=xmp, **({"quality": 95} | options[format]))


def seen(data: bytes) -> np.ndarray:
    """What a viewer shows that obeys the orientation, by Pillow and pillow-heif."""
    with PIL.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def farthest(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


PAIRS = [(a, b) for a in FORMATS for b in FORMATS]


@pytest.mark.parametrize(("given", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_everything_is_carried_in_every_pair(given, target) -> None:
    original = source(given, 6)
    image = decode_image(original)
    assert image.format == given and image.notes == ()
    data, notes = encode_with_notes(image, target, quality=95)
    assert notes == ()
    assert farthest(seen(data), scene()) <= TOLERANCE[given] + TOLERANCE[target]
    with PIL.open(io.BytesIO(data)) as written, PIL.open(io.BytesIO(original)) as opened:
        exif = written.getexif()
        assert exif[MAKE] == "A maker" and exif[0x8298] == "whose" and exif.get_ifd(GPS)[1] == "N"
        assert exif[ARTIST] == opened.getexif()[ARTIST] and exif.get(ORIENTATION, 1) == 1
        assert written.info["icc_profile"] == ICC
        xmp = written.info.get("xmp") or written.info.get("XML:com.adobe.xmp") or written.tag_v2[700]
        assert (xmp.encode() if isinstance(xmp, str) else xmp) == XMP.replace(b'"6"', b'"1"')
        dpi = written.info.get("dpi") or (exif[0x011A], exif[0x011B])
        assert [round(float(number), 2) for number in dpi] == [300, 300]
    assert read_header(data).format == target
    again = decode_image(data)
    assert again.pixels.shape == scene().shape and again.notes == ()  # a second run turns nothing
    assert again.xmp == XMP.replace(b'"6"', b'"1"')


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_exiftool_finds_everything_in_every_pair(tmp_path) -> None:
    for given, target in PAIRS:
        write_image(tmp_path / f"{given}-{target}{FORMATS[target]}", decode_image(source(given, 8)), target)
    tags = [
        "Make",
        "Artist",
        "Copyright",
        "XResolution",
        "GPSLatitudeRef",
        "Creator",
        "ProfileDescription",
        "Orientation",
    ]
    command = ["exiftool", "-j", "-n", "-Error", "-FileType", *(f"-{tag}" for tag in tags), str(tmp_path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(found) == len(PAIRS)
    for row in found:
        artist = (
            "Jos??" if Path(row["SourceFile"]).name.startswith(("avif-", "tiff-")) else "José"
        )  # Pillow wrote the source so
        expected = ["A maker", artist, "whose", 300, "N", "José", "sRGB built-in"]
        assert [row.get(tag) for tag in tags[:-1]] == expected and row.get("Orientation", 1) == 1, row
        assert "Error" not in row


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("given", FORMATS)
def test_orientation_is_applied_once(given, orientation) -> None:
    data = source(given, orientation)
    image = decode_image(data)
    assert farthest(image.pixels, scene()) <= TOLERANCE[given]
    assert ORIENTATION not in directory(image.exif) or image.exif == photograph(struct.pack("<H", 1))
    assert image.xmp == XMP.replace(b'"6"', b'"1"')
    header = read_header(data)
    assert sorted((header.height, header.width)) == [32, 48] and (header.channels, header.depth) == (3, 8)


@pytest.mark.parametrize("given", ["avif", "heic"])
def test_boxes_count_and_exif_beside_them_does_not(given) -> None:
    exif = photograph(struct.pack("<H", 6))
    turned = saved(stored(6), given, exif=block([entry(ORIENTATION, SHORT, b"\6\0")]), quality=95)
    assert read_heif(turned).orientation() == 6
    plain = saved(stored(1), given, quality=95)
    for data, note in ((turned, ()), (plain, ("orientation 6 of EXIF or XMP not applied: the file's own says 1",))):
        bare = decode_image(data)
        assert farthest(bare.pixels, scene()) <= 8
        both = decode_image(add_metadata(_without_items(data), exif, None, None))
        assert farthest(both.pixels, scene()) <= 8 and both.notes == note
        assert ORIENTATION not in directory(both.exif) and MAKE in directory(both.exif)


def _without_items(data: bytes) -> bytes:
    heif = read_heif(data)
    out = bytearray(data)
    for item, (kind, _) in heif.items.items():
        if kind == b"Exif":
            out[heif.item_types_at[item] : heif.item_types_at[item] + 4] = b"skip"
    return bytes(out)


def test_makers_notes_keep_their_place_through_a_tiff() -> None:
    note = b"MAKER\0" + bytes(range(64))
    exif = block([entry(MAKE, ASCII, b"A maker\0"), entry(0x8769, LONG, bytes(4)), entry(ORIENTATION, SHORT, b"\3\0")])
    place = len(exif)
    exif = exif.replace(struct.pack("<HHII", 0x8769, LONG, 1, 0), struct.pack("<HHII", 0x8769, LONG, 1, place))
    below = struct.pack("<H", 1) + struct.pack("<HHII", 0x927C, 7, len(note), place + 18) + bytes(4)
    exif += below + note
    image = decode_image(jpeg(np.asarray(stored(3)), exif_segment(exif)))
    tiff = encode_image(image, "tiff")
    assert tiff[place + 18 : place + 18 + len(note)] == note  # what it says of places stays true
    again = decode_image(encode_image(decode_image(tiff), "jpeg"))
    assert again.exif[place + 18 : place + 18 + len(note)] == note
    with PIL.open(io.BytesIO(encode_image(again, "webp"))) as written:
        assert written.getexif().get_ifd(0x8769)[0x927C] == note and written.getexif()[MAKE] == "A maker"


def test_tags_of_a_tiff_become_exif_wherever_they_lie() -> None:
    behind = bytes(80_000)
    for big in (False, True):
        buffer = io.BytesIO()
        extra = [(0x010F, 2, 8, "A maker", True), (0x83BC, 7, len(behind), behind, True)]
        tifffile.imwrite(
            buffer, scene(), photometric="rgb", bigtiff=big, extratags=extra, software="this", metadata=None
        )
        image = decode_image(buffer.getvalue())
        with PIL.open(io.BytesIO(encode_image(image, "jpeg"))) as written:
            assert written.getexif()[MAKE] == "A maker" and written.getexif()[0x0131] == "this"
            assert 0x0100 not in written.getexif() and 0x83BC not in written.getexif()


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


def tiff(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **({"photometric": "rgb"} | options))
    return buffer.getvalue()


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


class Copy(nn.Module):
    def forward(self, x):
        return x


def test_a_folder_of_all_formats_is_restored(tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for given, suffix in FORMATS.items():
        (folder / f"{given}{suffix}").write_bytes(source(given, 6))
    (folder / "deep.png").write_bytes(png(scene().astype(np.uint16) * 257))
    for format in ("same", *FORMATS):
        jobs = collect_jobs([folder], tmp_path / format, format)
        assert len(jobs) == len(FORMATS) + 1 or format != "same"
        for outcome in restore_files(Copy(), jobs, format=format):
            if outcome.error is not None:  # deep.png beside png.jpg, ...
                assert "its output" in outcome.error
                continue
            image = decode_image(outcome.target.read_bytes())
            given = SUFFIXES[outcome.source.suffix]
            assert image.format == (given if format == "same" else format) == SUFFIXES[outcome.target.suffix]
            deep = outcome.source.stem == "deep" and image.format not in ("png", "tiff")
            assert len(outcome.notes) == deep and all("16 bits rounded to" in note for note in outcome.notes)
            found = image.pixels if image.pixels.dtype == np.uint8 else np.rint(image.pixels / 257)
            assert farthest(found, scene()) <= TOLERANCE[given] + TOLERANCE[image.format]


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


# --- colours


def profile_of(space: bytes) -> bytes:
    return bytes(16) + space + bytes(16) + b"acsp" + bytes(88)


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


# --- photographs, the manual


def test_photographs_in_every_format(tmp_path) -> None:
    files = sorted(PHOTOGRAPHS.rglob("*.[jp][pn]g"))[:2]
    if not files:
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    for path in files:
        with PIL.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))[:160, :200]
        for target in FORMATS:
            write_image(tmp_path / f"a{FORMATS[target]}", ImageFile(pixels), target, quality=95)
            found = seen((tmp_path / f"a{FORMATS[target]}").read_bytes())
            error = ((found.astype(float) - pixels) ** 2).mean()
            assert (
                error == 0
                if target in ("png", "tiff")
                else 10 * np.log10(255**2 / error) > (30 if target == "webp" else 38)
            )


def test_the_manual_s_table_is_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "formats.md").read_text()
    for name, spec in FORMAT_SPECS.items():
        depths = ", ".join("float32" if bits == 32 else str(bits) for bits in spec.write_depths)
        row = [spec.title, f"`{name}`", " ".join(f"`{suffix}`" for suffix in spec.suffixes), depths]
        row += ["yes" if spec.grey else "as RGB", "yes" if spec.alpha else "no", spec.orientation, f"`{spec.extra}`"]
        assert "| " + " | ".join(row) + " |" in page
