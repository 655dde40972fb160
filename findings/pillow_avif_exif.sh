#!/usr/bin/env bash
# Pillow 12.3.0: save("AVIF", exif=block) writes another EXIF block than the one given as soon as it has an Orientation
# entry. The orientation goes into the container (irot, imir), for which the block is parsed and written anew, and what
# Pillow does not keep is lost without a word: text of EXIF 3.0's type 129 (UTF-8) whole, and in an entry of type 2
# (ASCII), into which many programs write UTF-8, every byte beyond ASCII, which becomes "?". JPEG, PNG and WebP carry
# the same block byte for byte, and so does AVIF where the block has no Orientation: a test without one sees nothing.
# Matters here: EXIF is put into the container by own code, never by save(exif=).
#
# Seen, artist "José" beside an Orientation of 6: JPEG, PNG, WebP verbatim; AVIF "Jos??" (type 2), no artist at all
# (type 129); without the Orientation AVIF verbatim.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==12.3.0
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct

import PIL
from PIL import Image

ORIENTATION, ARTIST, SHORT = 274, 315, 3


def exif(kind, orientation):
    """A block with an artist, as text of that type, and perhaps an orientation."""
    text = "José".encode() + b"\0"
    entries = [struct.pack(">HHIHH", ORIENTATION, SHORT, 1, orientation, 0)] if orientation else []
    behind = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries.append(struct.pack(">HHII", ARTIST, kind, len(text), behind))
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + bytes(4) + text


def saved(form, block):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, form, exif=b"Exif\0\0" + block)
    return file.getvalue()


verbatim, seen = {}, {}
for kind in (2, 129):
    for form in ("JPEG", "PNG", "WEBP", "AVIF"):
        verbatim[form, kind] = exif(kind, 6) in saved(form, exif(kind, 6))
    seen[kind] = Image.open(io.BytesIO(saved("AVIF", exif(kind, 6)))).info["exif"]
    verbatim["AVIF without orientation", kind] = exif(kind, 0) in saved("AVIF", exif(kind, 0))
print(PIL.__version__, verbatim, seen)
assert all(kept for (form, _), kept in verbatim.items() if form != "AVIF")
assert not verbatim["AVIF", 2] and not verbatim["AVIF", 129], "changed: AVIF carries the block verbatim"
assert b"Jos??" in seen[2] and b"Jos" not in seen[129], "changed: the text is kept"
PYTHON
