"""Files of every format with metadata, written and read by other libraries than those under test."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from exif_blocks import chunk, exif_segment, jpeg, photograph, segment
from PIL import Image as PIL
from PIL import ImageCms, ImageOps

tifffile = pytest.importorskip("tifffile")
pillow_heif = pytest.importorskip("pillow_heif")
pillow_heif.register_heif_opener()

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


def tiff(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **({"photometric": "rgb"} | options))
    return buffer.getvalue()


def profile_of(space: bytes) -> bytes:
    return bytes(16) + space + bytes(16) + b"acsp" + bytes(88)
