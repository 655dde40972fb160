"""Every pair of formats: pixels, orientation, metadata, written and read by other libraries than those under test."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile
from exif_blocks import (
    ARTIST,
    ASCII,
    GPS,
    LONG,
    MAKE,
    ORIENTATION,
    SHORT,
    block,
    directory,
    entry,
    exif_segment,
    jpeg,
    photograph,
    png,
)
from picture_files import ICC, TOLERANCE, XMP, farthest, saved, scene, seen, source, stored
from PIL import Image as PIL
from torch import nn

from mirage.images import (
    FORMAT_SPECS,
    FORMATS,
    SUFFIXES,
    ImageFile,
    decode_image,
    encode_image,
    encode_with_notes,
    read_header,
    write_image,
)
from mirage.images.boxes import add_metadata, read_heif
from mirage.restore import collect_jobs, restore_files

REPOSITORY = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = REPOSITORY.parent / "shared" / "data" / "CBSD68"

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
