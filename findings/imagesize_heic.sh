#!/usr/bin/env bash
# imagesize 2.0.1 on files of pillow-heif 1.8.1 (libheif 1.23.6, x265): get() of a HEIC gives the size of what is coded,
# not the picture's, wherever the two differ, which is for every odd side and every side below 64: libheif codes even
# sides of at least 64 pixels, whose size is in `ispe`, and cuts the picture out by a `clap` (clean aperture) beside it.
# imagesize applies the container's rotation (`irot`), but not its `clap`. pillow-heif applies both.
# Matters here: sizes are read from headers, ahead of decoding; `ispe` alone is not the picture's.
#
# Seen: 642x428 of a picture of 641x427, 64x64 of 48x32, and 640x426 of 640x426.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==12.3.0 pillow-heif==1.8.1 imagesize==2.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import io
from importlib.metadata import version

import imagesize
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
sizes = {}
for size in ((640, 426), (641, 427), (48, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 50, 10)).save(file, "HEIF", quality=90)
    sizes[size] = imagesize.get(io.BytesIO(file.getvalue()))
    assert Image.open(file).size == size
print("imagesize", version("imagesize"), "libheif", pillow_heif.libheif_version(), sizes)
assert sizes[640, 426] == (640, 426)
assert sizes[641, 427] == (642, 428) and sizes[48, 32] == (64, 64), "changed: the picture's size is given"
PYTHON
