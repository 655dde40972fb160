"""Pictures that show input, restored image, target and error side by side, pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mirage.evaluate.metrics import measure

__all__ = ["ERROR_SCALE", "draw_sheet"]

DPI = 100
GAP, HEAD = 8, 44
"""Between pictures, and above them for their names, in pixels."""

ERROR_SCALE = 0.2
"""The error that is drawn brightest: mean of |restored - target| over R, G, B."""


def draw_sheet(
    path: Path, degraded: np.ndarray, restored: np.ndarray, target: np.ndarray, title: str, label: str
) -> None:
    """Write a PNG of four pictures in a row, each at its own size, with PSNRs above them.

    Args:
        degraded, restored, target: ``[H, W, 3]``, floating point; clipped to [0, 1].
        title: above the row.
        label: of the method, above the restored picture.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    degraded, restored, target = (np.clip(x, 0, 1) for x in (degraded, restored, target))
    error = np.abs(restored - target).mean(axis=2)
    coloured = colormaps["inferno"](np.clip(error / ERROR_SCALE, 0, 1))[..., :3]
    height, width = error.shape
    names = [
        f"input, {_psnr(target, degraded)}",
        f"{label}, {_psnr(target, restored)}",
        "target",
        f"|{label} - target|, 0 to {ERROR_SCALE:g}",
    ]
    figure = Figure(figsize=((4 * width + 3 * GAP) / DPI, (height + HEAD) / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    size = min(9.0, width / 22)  # a heading has some 22 characters
    for i, (picture, name) in enumerate(zip((degraded, restored, target, coloured), names, strict=True)):
        left = i * (width + GAP)
        figure.figimage(np.round(picture * 255).astype(np.uint8), left, 0, origin="upper")
        figure.text((left + 2) / (4 * width + 3 * GAP), (height + 5) / (height + HEAD), name, fontsize=size)
    figure.text(2 / (4 * width + 3 * GAP), (height + HEAD - 18) / (height + HEAD), title, fontsize=size, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


def _psnr(target: np.ndarray, image: np.ndarray) -> str:
    return f"{measure(target, image, ['psnr'])['psnr']:.2f} dB"
