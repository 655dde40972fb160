#!/usr/bin/env bash
# imagecodecs 2026.3.6: avif_encode without `speed` encodes at speed 0, the slowest of 0 to 10, where Pillow and avifenc
# take 6: two orders of magnitude longer than at 8. Its docstring names no default. (None is passed on as libavif's
# "default of the codec", and that of libaom is 0.)
# Matters here: the AVIF writer names its speed.
#
# Seen, 96x96 noise over a wave, level 80 (2 cores of an AMD EPYC):
#
#     speed default: 0.657 s, 8415 bytes, 30.16 dB
#     speed 0: 0.654 s, 8415 bytes, 30.16 dB
#     speed 6: 0.017 s, 7494 bytes, 28.80 dB
#     speed 8: 0.005 s, 7160 bytes, 28.62 dB
#
# The check asks for equal files of the first two, and for a ratio above 10 of the first to the last.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 imagecodecs==2026.3.6
"$folder/venv/bin/python" - <<'PYTHON'
import time

import imagecodecs
import numpy as np

y, x = np.mgrid[:96, :96]
wave = 128 + 80 * np.sin(x / 9)[..., None] * np.cos(y / 7 + np.arange(3)[:, None, None]).transpose(1, 2, 0)
image = np.clip(wave + np.random.default_rng(0).normal(0, 20, (96, 96, 3)), 0, 255).astype(np.uint8)


def encode(repeats, **speed):
    """Seconds (the best), the file, and its PSNR in dB."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        file = imagecodecs.avif_encode(image, level=80, **speed)
        seconds.append(time.perf_counter() - start)
    error = imagecodecs.avif_decode(file).astype(float) - image
    return min(seconds), file, 10 * np.log10(255**2 / np.square(error).mean())


default, slowest, usual, fast = encode(1), encode(1, speed=0), encode(3, speed=6), encode(3, speed=8)
print("imagecodecs", imagecodecs.__version__)
for name, (seconds, file, psnr) in {"default": default, "0": slowest, "6": usual, "8": fast}.items():
    print(f"speed {name}: {seconds:.3f} s, {len(file)} bytes, {psnr:.2f} dB")
assert default[1] == slowest[1], "changed: the default is not the slowest speed"
assert default[0] > 10 * fast[0], "changed: the default is not much slower than speed 8"
PYTHON
