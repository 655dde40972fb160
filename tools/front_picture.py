"""The README's picture: a photograph with noise, restored, and as it was, by the commands that the README names.

``python -m tools.front_picture`` writes ``docs/pictures/denoise.jpg`` and prints what the caption says. The photograph
is `skimage.data.chelsea`, which its photographer, Stéfan van der Walt, gave into the public domain (CC0).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PICTURE = Path("docs/pictures/denoise.jpg")
SIGMA = 25
# Between the three parts, in pixels: wide enough to be seen on a small screen.
GAP = 6


def _mirage(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "mirage.cli", *arguments], check=True)


def main() -> None:
    """Draws the picture.

    Raises:
        subprocess.CalledProcessError: a command failed, such as `mirage restore` where the weights do not lie.
    """
    from skimage import data, io
    from skimage.metrics import peak_signal_noise_ratio

    clean = data.chelsea()
    with tempfile.TemporaryDirectory() as folder:
        cat, noisy, restored = (str(Path(folder, name)) for name in ("cat.png", "noisy", "restored"))
        io.imsave(cat, clean)
        _mirage("degrade", cat, "-o", noisy, "--kind", "gaussian_noise", "--range", f"sigma={SIGMA}")
        _mirage("restore", f"{noisy}/degraded", "--weights", "denoise", "-o", restored)
        parts = [io.imread(f"{noisy}/degraded/cat.png"), io.imread(f"{restored}/cat.png"), clean]
    gap = np.full((clean.shape[0], GAP, 3), 255, np.uint8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    io.imsave(PICTURE, np.hstack([parts[0], gap, parts[1], gap, parts[2]]), quality=92)
    for name, part in zip(("noisy", "restored"), parts, strict=False):
        print(f"{name}: {peak_signal_noise_ratio(clean, part):.2f} dB")


if __name__ == "__main__":
    main()
