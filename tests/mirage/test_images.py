"""Orientation applied once, metadata carried to the byte in every pair of formats, and never in the picture's way."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from exif_blocks import (
    ARTIST,
    ASCII,
    BYTE,
    GPS,
    LONG,
    MAKE,
    ORIENTATION,
    SHORT,
    SLONG,
    SSHORT,
    UNIT,
    block,
    chunk,
    directory,
    entry,
    exif_segment,
    jpeg,
    jpeg_segments,
    photograph,
    png,
    png_chunks,
    segment,
)
from PIL import Image as PIL
from PIL import ImageOps

from mirage.images import ImageError, ImageFile, decode_image, encode_image

XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"
XMP_CHUNK = b"XML:com.adobe.xmp\0\0\0\0\0"


def scene(dtype=np.uint8) -> np.ndarray:
    """48 x 32, another colour in each corner: no turn of it looks like another, and JPEG keeps it."""
    y, x = np.mgrid[0:32, 0:48]
    picture = np.stack([x * 5, y * 7, 255 - x * 3 - y], 2).clip(0, 255).astype(np.uint8)
    return picture if dtype is np.uint8 else picture.astype(np.uint16) * 257


def turned(orientation: int, dtype=np.uint8) -> np.ndarray:
    """What has to be stored for the scene to be seen, after Pillow's own rule."""
    stored = PIL.fromarray(scene())
    undo = {
        1: None,
        2: PIL.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Transpose.ROTATE_180,
        4: PIL.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Transpose.TRANSPOSE,
        6: PIL.Transpose.ROTATE_90,
        7: PIL.Transpose.TRANSVERSE,
        8: PIL.Transpose.ROTATE_270,
    }[orientation]
    pixels = np.asarray(stored if undo is None else stored.transpose(undo))
    return pixels if dtype is np.uint8 else pixels.astype(np.uint16) * 257


def source(kind: str, orientation: int, order: str = "<") -> bytes:
    exif = photograph(struct.pack(f"{order}H", orientation), order)
    if kind == "jpeg":
        return jpeg(turned(orientation), exif_segment(exif))
    dtype = np.uint16 if "16" in kind else np.uint8
    return png(turned(orientation, dtype), chunk(b"eXIf", exif), late="late" in kind)


def shown(data: bytes) -> np.ndarray:
    """What a viewer shows that obeys the orientation, by Pillow; in 8 bits."""
    with PIL.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def exif_of(data: bytes) -> bytes:
    if data.startswith(b"\xff\xd8"):
        (found,) = (body[6:] for marker, body in jpeg_segments(data) if marker == 0xE1 and body[:4] == b"Exif")
    else:
        (found,) = (body for kind, body in png_chunks(data) if kind == b"eXIf")
    return found


SOURCES = ["jpeg", "png", "png late", "png16", "png16 late"]


@pytest.mark.parametrize("target", ["png", "jpeg"])
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation, kind, target) -> None:
    data = source(kind, orientation, "<>"[orientation % 2])
    image = decode_image(data)
    assert image.pixels.dtype == (np.uint16 if "16" in kind else np.uint8)
    written = encode_image(image, target, quality=100)
    seen = shown(written).astype(int)
    assert seen.shape == scene().shape
    assert np.abs(seen - scene()).max() <= (0 if "png" in kind and target == "png" else 4)
    again = decode_image(written)  # a second run turns nothing
    assert np.array_equal(again.pixels.shape, scene().shape)
    assert np.abs(again.pixels.astype(int) // (257 if again.pixels.dtype == np.uint16 else 1) - scene()).max() <= 4
    assert image.notes == again.notes == ()


@pytest.mark.parametrize("target", ["png", "jpeg"])
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_is_carried_to_the_byte(orientation, order, kind, target) -> None:
    before = photograph(struct.pack(f"{order}H", orientation), order)
    after = exif_of(encode_image(decode_image(source(kind, orientation, order)), target))
    if orientation == 1:
        assert after == before
        return
    assert len(after) == len(before) and after[:8] == before[:8]
    entries = directory(before)
    assert entries.pop(ORIENTATION) and directory(after) == entries and MAKE in entries and GPS in entries
    behind = 8 + 2 + 12 * (len(entries) + 1) + 4
    assert after[behind:] == before[behind:] and "José".encode() in after
    (gps_at,) = struct.unpack(f"{order}I", entries[GPS][-4:])
    assert after[gps_at + 2 : gps_at + 10] == struct.pack(f"{order}HHI", 1, ASCII, 2)


def test_every_entry_stays_what_it_was_for_pillow() -> None:
    for target in ("png", "jpeg"):
        with PIL.open(io.BytesIO(encode_image(decode_image(source("jpeg", 8)), target))) as image:
            exif = image.getexif()
            assert (
                ORIENTATION not in exif and exif[MAKE] == "A maker" and exif[ARTIST] == "José".encode().decode("latin1")
            )
            assert exif.get_ifd(GPS) == {1: "N"}


@pytest.mark.parametrize(("kind", "pack"), [(BYTE, "B"), (SHORT, "H"), (LONG, "I"), (SSHORT, "h"), (SLONG, "i")])
@pytest.mark.parametrize("order", "<>")
def test_orientation_stored_as_another_number(kind, pack, order) -> None:
    exif = photograph(struct.pack(f"{order}{pack}", 6), order, kind)
    image = decode_image(jpeg(turned(6), exif_segment(exif)))
    assert image.pixels.shape == scene().shape and ORIENTATION not in directory(image.exif)


ODD = {
    "LONG 70000 as a width": [entry(0x0100, LONG, struct.pack("<I", 70000))],
    "SSHORT -1": [entry(0x0100, SSHORT, struct.pack("<h", -1))],
    "an unknown type": [(0x0100, 77, 1, b"abcd")],
    "a place outside": [(MAKE, ASCII, 100, struct.pack("<I", 1 << 30))],
    "a count beyond all": [(MAKE, SHORT, 0xFFFFFFFF, b"\0\0\0\0")],
    "a rational over zero": [(0x011A, 5, 1, struct.pack("<I", 8))],
}


@pytest.mark.parametrize(
    "wrap", [lambda e: jpeg(turned(6), exif_segment(e)), lambda e: png(turned(6), chunk(b"eXIf", e))]
)
@pytest.mark.parametrize("entries", ODD.values(), ids=ODD)
def test_odd_entries_are_carried_beside_a_sound_orientation(entries, wrap) -> None:
    exif = block([*entries, entry(ORIENTATION, SHORT, struct.pack("<H", 6))])
    image = decode_image(wrap(exif))
    assert np.abs(image.pixels.astype(int) - scene()).max() <= 4 and image.notes == ()
    expected = directory(exif)
    del expected[ORIENTATION]
    for target in ("png", "jpeg"):
        assert directory(exif_of(encode_image(image, target))) == expected


UNREADABLE = {
    "text": (block([entry(ORIENTATION, ASCII, b"6\0")]), "EXIF orientation not read: expected one number, got type 2"),
    "two values": (block([entry(ORIENTATION, SHORT, struct.pack("<HH", 6, 6))]), "got type 3, 2 values"),
    "no header": (b"ABCDEFGH" + bytes(20), "EXIF left out: no TIFF header, but b'ABCDEFGH'"),
    "a short block": (b"II*\0", "EXIF left out: no TIFF header"),
    "directory outside": (b"II*\0" + struct.pack("<I", 1 << 20), "its directory lies outside the block"),
}


@pytest.mark.parametrize("wrap", [lambda e: jpeg(scene(), exif_segment(e)), lambda e: png(scene(), chunk(b"eXIf", e))])
@pytest.mark.parametrize(("exif", "note"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_noted_and_the_picture_read(exif, note, wrap) -> None:
    image = decode_image(wrap(exif))
    assert np.abs(image.pixels.astype(int) - scene()).max() <= 4
    (found,) = image.notes
    assert note in found
    assert image.exif == (None if "left out" in note else exif)


@pytest.mark.parametrize("value", [0, 9, 70])
def test_orientations_that_mean_nothing_stay(value) -> None:
    exif = block([entry(ORIENTATION, SHORT, struct.pack("<H", value))])
    image = decode_image(jpeg(scene(), exif_segment(exif)))
    assert image.pixels.shape == scene().shape and image.exif == exif and image.notes == ()


def test_short_and_empty_directories() -> None:
    whole = photograph(struct.pack("<H", 6))
    for exif in (b"", whole[:8] + b"\xff\xff" + whole[10:60], block([])):
        image = decode_image(jpeg(scene(), exif_segment(exif)))
        assert image.pixels.shape[2] == 3
        encode_image(image, "png")
    cut = whole[: 8 + 2 + 2 * 12]  # the orientation is the last entry there is: made a 1 in its place
    image = decode_image(jpeg(turned(6), exif_segment(cut)))
    assert image.pixels.shape == scene().shape
    assert image.exif == cut[:-4] + b"\1\0\0\0"


def test_a_long_block_in_several_segments() -> None:
    exif = photograph(struct.pack("<H", 6)) + bytes(range(256)) * 400
    first, second = exif[:65527], exif[65527:]
    data = jpeg(turned(6), exif_segment(first), exif_segment(second))
    image = decode_image(data)
    assert image.pixels.shape == scene().shape and image.exif[-102400:] == exif[-102400:]
    assert decode_image(encode_image(image, "jpeg")).exif == image.exif
    assert decode_image(encode_image(image, "png")).exif == image.exif
    other = decode_image(jpeg(turned(6), exif_segment(photograph(b"\6\0")), exif_segment(photograph(b"\1\0"))))
    assert other.pixels.shape == scene().shape and len(other.exif) == len(photograph(b"\6\0"))


# --- density


def jfif(x: int, y: int, unit: int) -> bytes:
    return segment(0xE0, b"JFIF\0\1\1" + struct.pack(">BHH", unit, x, y) + b"\0\0")


def dpi(data: bytes):
    with PIL.open(io.BytesIO(data)) as image:
        return image.info.get("dpi")


@pytest.mark.parametrize("density", [300, 72, 96, 600, 1])
def test_density_in_every_pair_of_formats(density) -> None:
    metres = struct.pack(">IIB", *[round(density / 0.0254)] * 2, 1)
    sources = jpeg(scene(), jfif(density, density, 1), jfif=False), png(scene(), chunk(b"pHYs", metres))
    for data in sources:
        image = decode_image(data)
        assert dict(png_chunks(encode_image(image, "png")))[b"pHYs"] == metres
        written = encode_image(image, "jpeg")
        assert written[:20] == b"\xff\xd8" + jfif(density, density, 1)
        assert dpi(written) == (density, density)


def test_density_by_the_centimetre_by_exif_and_as_a_ratio() -> None:
    image = decode_image(jpeg(scene(), jfif(118, 100, 2), jfif=False))
    assert encode_image(image)[:20] == b"\xff\xd8" + jfif(118, 100, 2)
    assert dict(png_chunks(encode_image(image, "png")))[b"pHYs"] == struct.pack(">IIB", 11800, 10000, 1)
    image = decode_image(jpeg(scene(), exif_segment(photograph(None)), jfif=False))  # a camera's: no JFIF
    assert encode_image(image)[:20] == b"\xff\xd8" + jfif(300, 300, 1)
    assert dict(png_chunks(encode_image(image, "png")))[b"pHYs"] == struct.pack(">IIB", 11811, 11811, 1)
    image = decode_image(jpeg(scene(), jfif(4, 3, 0), jfif=False))
    assert encode_image(image)[:20] == b"\xff\xd8" + jfif(4, 3, 0)
    assert dict(png_chunks(encode_image(image, "png")))[b"pHYs"] == struct.pack(">IIB", 4, 3, 0)
    plain = decode_image(jpeg(scene()))
    assert b"pHYs" not in dict(png_chunks(encode_image(plain, "png")))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_picture_has_a_turned_density(orientation) -> None:
    exif = block([entry(ORIENTATION, SHORT, struct.pack("<H", orientation))])
    x, y = (200, 100) if orientation == 6 else (100, 200)
    image = decode_image(jpeg(turned(orientation), jfif(100, 200, 1), exif_segment(exif), jfif=False))
    assert encode_image(image)[:20] == b"\xff\xd8" + jfif(x, y, 1)
    size = chunk(b"pHYs", struct.pack(">IIB", 1000, 2000, 1))
    image = decode_image(png(turned(orientation), size, chunk(b"eXIf", exif)))
    assert dict(png_chunks(encode_image(image)))[b"pHYs"] == struct.pack(">IIB", x * 10, y * 10, 1)


# --- profiles, XMP, texts


PROFILE = bytes(np.random.default_rng(0).integers(0, 256, 150_000, dtype=np.uint8))


def icc(profile: bytes, parts: int = 3) -> list[bytes]:
    size = -(-len(profile) // parts)
    cut = [profile[i * size : (i + 1) * size] for i in range(parts)]
    return [segment(0xE2, b"ICC_PROFILE\0" + bytes([i, parts]) + part) for i, part in enumerate(cut, 1)]


def test_profiles_in_every_pair_of_formats() -> None:
    packed = chunk(b"iCCP", b"a name\0\0" + zlib.compress(PROFILE))
    first, second, third = icc(PROFILE)
    for data in (jpeg(scene(), second, first, third), png(scene(), packed), png(scene(np.uint16), packed)):
        image = decode_image(data)
        assert image.icc_profile == PROFILE and image.notes == ()
        for target in ("jpeg", "png"):
            with PIL.open(io.BytesIO(encode_image(image, target))) as written:
                assert written.info["icc_profile"] == PROFILE
    assert dict(png_chunks(encode_image(decode_image(png(scene(), packed)))))[b"iCCP"][:8] == b"a name\0\0"


def test_broken_profiles_are_left_out_with_a_note() -> None:
    first, _, third = icc(PROFILE)
    for data in (jpeg(scene(), first, third), png(scene(), chunk(b"iCCP", b"a\0\0broken"))):
        image = decode_image(data)
        assert image.icc_profile is None and "colour profile left out" in image.notes[0] and image.chunks == ()


@pytest.mark.parametrize("target", ["jpeg", "png"])
def test_xmp_is_carried_and_its_orientation_set_right(target) -> None:
    xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6" dc:creator="José"/></x:xmpmeta>'.encode()
    upright = xmp.replace(b'"6"', b'"1"')
    exif = block([entry(ORIENTATION, SHORT, b"\6\0")])
    compressed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))
    sources = [
        jpeg(turned(6), exif_segment(exif), segment(0xE1, XMP_SEGMENT + xmp)),
        jpeg(turned(6), segment(0xE1, XMP_SEGMENT + xmp)),  # EXIF says nothing: XMP counts
        png(turned(6), chunk(b"iTXt", XMP_CHUNK + xmp), chunk(b"eXIf", exif)),
        png(turned(6), compressed, late=True),
    ]
    for data in sources:
        image = decode_image(data)
        assert image.pixels.shape == scene().shape and image.notes == ()
        written = encode_image(image, target)
        assert np.abs(shown(written).astype(int) - scene()).max() <= 4
        if target == "jpeg":
            assert (0xE1, XMP_SEGMENT + upright) in jpeg_segments(written)
        else:
            assert (b"iTXt", XMP_CHUNK + upright) in png_chunks(written)
    element = b"<tiff:Orientation>6</tiff:Orientation>"
    image = decode_image(jpeg(turned(6), segment(0xE1, XMP_SEGMENT + element)))
    assert image.pixels.shape == scene().shape and image.xmp == element.replace(b"6", b"1")


def test_exif_goes_before_xmp() -> None:
    xmp = b'<a tiff:Orientation="6"/>'
    exif = block([entry(ORIENTATION, SHORT, b"\1\0")])
    image = decode_image(jpeg(scene(), exif_segment(exif), segment(0xE1, XMP_SEGMENT + xmp)))
    assert image.pixels.shape == scene().shape and image.xmp == xmp and image.exif == exif


def test_xmp_of_a_motion_photo_is_left_out_with_a_note() -> None:
    xmp = b'<a GCamera:MicroVideo="1" GCamera:MicroVideoOffset="1234"/>'
    image = decode_image(jpeg(scene(), segment(0xE1, XMP_SEGMENT + xmp)) + b"a video")
    assert image.xmp is None and image.notes == (
        "XMP left out: it describes other parts of the file (a video, a gain map), which are too",
    )


def test_texts_stay_within_png_and_comments_within_jpeg() -> None:
    texts = [
        (b"tEXt", b"Author\0me"),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"long")),
        (b"iTXt", "Title\0\0\0\0\0é".encode()),
    ]
    for late in (False, True):
        image = decode_image(png(scene(), *(chunk(*text) for text in texts), late=late))
        assert [text for text in png_chunks(encode_image(image)) if text[0] in (b"tEXt", b"zTXt", b"iTXt")] == texts
        encode_image(image, "jpeg")
    image = decode_image(jpeg(scene(), segment(0xFE, b"a comment")))
    assert (0xFE, b"a comment") in jpeg_segments(encode_image(image))
    encode_image(image, "png")


def test_exif_as_imagemagick_once_kept_it() -> None:
    exif = photograph(b"\6\0")
    digits = (b"Exif\0\0" + exif).hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    text = f"\nexif\n{len(digits) // 2:8}\n{lines}\n".encode()
    image = decode_image(png(turned(6), chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))))
    assert np.array_equal(image.pixels, scene()) and image.chunks == ()
    assert ORIENTATION not in directory(image.exif) and UNIT in directory(image.exif)


# --- no metadata decides over the pixels


BROKEN_CHUNKS = {
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "text that does not decompress": chunk(b"zTXt", b"a\0\0broken"),
    "text that decompresses to much": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20))),
    "short pHYs": chunk(b"pHYs", b"ab"),
    "short cHRM": chunk(b"cHRM", b"ab"),
    "empty iCCP": chunk(b"iCCP", b""),
    "iTXt without ends": chunk(b"iTXt", b"a"),
    "XMP that does not decompress": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0broken"),
    "raw profile of nothing": chunk(b"tEXt", b"Raw profile type exif\0exif 12 zz"),
    "unknown": chunk(b"abCd", b"?"),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("broken", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_broken_chunks_beside_a_sound_picture(broken, dtype, late) -> None:
    image = decode_image(png(scene(dtype), broken, late=late))
    assert np.array_equal(image.pixels, scene(dtype))
    encode_image(image, "jpeg")
    assert np.array_equal(imagecodecs.png_decode(encode_image(image)), scene(dtype))


BROKEN_SEGMENTS = {
    "MPF": segment(0xE2, b"MPF\0broken"),
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\xff\xff\xff"),
    "short ICC": segment(0xE2, b"ICC_PROFILE\0"),
    "empty XMP": segment(0xE1, XMP_SEGMENT),
    "JFXX": segment(0xE0, b"JFXX\0\x10"),
    "fill bytes": b"\xff\xff\xff",
}


@pytest.mark.parametrize("broken", BROKEN_SEGMENTS.values(), ids=BROKEN_SEGMENTS)
def test_broken_segments_beside_a_sound_picture(broken) -> None:
    image = decode_image(jpeg(scene(), broken))
    expected = np.asarray(PIL.open(io.BytesIO(jpeg(scene()))))
    assert np.array_equal(image.pixels, expected)
    encode_image(image, "png")


def test_pictures_that_are_broken_are_still_refused() -> None:
    data = jpeg(scene(), exif_segment(photograph(b"\6\0")))
    with pytest.raises(ImageError, match="broken JPEG: image file is truncated"):
        decode_image(data[:-20])
    with pytest.raises(ImageError, match="broken JPEG"):
        decode_image(data[:40])
    for dtype in (np.uint8, np.uint16):
        data = png(scene(dtype))
        for cut in (data[:-40], data[:30], data[:41]):
            with pytest.raises(ImageError, match="broken PNG"):
                decode_image(cut)


def test_colours_of_cmyk_and_grey_survive_the_taking_apart() -> None:
    """The Adobe segment says how CMYK is stored: without it the colours would be inverted."""
    buffer = io.BytesIO()
    PIL.new("CMYK", (9, 9), (0, 255, 255, 0)).save(buffer, "JPEG")
    assert np.abs(decode_image(buffer.getvalue()).pixels.astype(int) - [255, 0, 0]).max() <= 3
    grey = decode_image(jpeg(scene()[..., 0], exif_segment(photograph(b"\3\0"))))
    assert grey.pixels.shape == (32, 48, 1)
    assert np.abs(grey.pixels[..., 0].astype(int) - scene()[::-1, ::-1, 0]).max() <= 4


def test_images_without_metadata_are_written_without() -> None:
    written = encode_image(ImageFile(scene()), "jpeg")
    assert {marker for marker, _ in jpeg_segments(written)} <= {0xE0, 0xDB, 0xC0, 0xC4}
    assert {kind for kind, _ in png_chunks(encode_image(ImageFile(scene())))} == {b"IHDR", b"IDAT", b"IEND"}
