"""Loss by resolution and by files: super-resolution's input at full size, JPEG, and parts painted over."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mirage.degradations.base import Degradation, Range, draw_uniform, draw_whole, ranged, register, rounded_to_8_bits
from mirage.extras import not_there

__all__ = ["Inpainting", "Jpeg", "SuperResolution"]

METHODS = ("nearest", "bilinear", "bicubic")
SUBSAMPLING = ("4:4:4", "4:2:2", "4:2:0")


@register
@dataclass(frozen=True)
class SuperResolution(Degradation):
    """Made smaller, and as large as before again, each time by a method that is drawn.

    Args:
        scale: of the sides; they are rounded to whole pixels.
        methods: those that are drawn from: ``nearest`` (to the pixel's centre), ``bilinear``, ``bicubic``.
        antialias: bilinear and bicubic kernels widen where the image becomes smaller, as MATLAB's ``imresize`` and
            Pillow do, with Keys' bicubic (-0.5); without it they skip pixels, as OpenCV does (-0.75).
    """

    id = "SR"
    name = "super_resolution"
    scale: Range = ranged(0.25, 1, least=1e-3, most=1)
    methods: tuple[str, ...] = METHODS
    antialias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        methods = (self.methods,) if isinstance(self.methods, str) else tuple(self.methods)
        if not methods or not set(methods) <= set(METHODS):
            raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {self.methods!r}")
        object.__setattr__(self, "methods", methods)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        scale = draw_uniform(generator, self.scale)
        down, up = (self.methods[draw_whole(generator, (0, len(self.methods) - 1))] for _ in range(2))
        return {"scale": scale, "down": down, "up": up, "antialias": self.antialias}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        size = list(image.shape[-2:])
        small = [max(1, round(n * values["scale"])) for n in size]
        reduced = _resized(image, small, values["down"], values["antialias"])
        return _resized(reduced, size, values["up"], values["antialias"])


def _resized(image: Tensor, size: list[int], method: str, antialias: bool) -> Tensor:
    if method == "nearest":  # PyTorch's plain "nearest" takes the pixel at the corner, and so moves the image
        return F.interpolate(image[None], size, mode="nearest-exact")[0]
    return F.interpolate(image[None], size, mode=method, align_corners=False, antialias=antialias)[0]


@register
@dataclass(frozen=True)
class Jpeg(Degradation):
    """Written as JPEG by libjpeg, and read again; rounded to 8 bits before.

    Args:
        quality: of libjpeg, whole numbers.
        subsampling: of colours; ``4:2:0`` is the default of libjpeg.
    """

    id = "JP"
    name = "jpeg"
    quality: Range = ranged(10, 40, least=1, most=100, whole=True)
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:2:0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subsampling not in SUBSAMPLING:
            raise ValueError(f"subsampling: expected one of {', '.join(SUBSAMPLING)}, got {self.subsampling!r}")

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return {"quality": draw_whole(generator, self.quality), "subsampling": self.subsampling}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        missing = not_there("images", "PIL")
        if missing is not None:
            raise ImportError(missing)
        from PIL import Image

        pixels = (rounded_to_8_bits(image) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        file = io.BytesIO()
        written = Image.fromarray(np.ascontiguousarray(pixels))
        written.save(file, "JPEG", quality=values["quality"], subsampling=values["subsampling"])
        with Image.open(file) as read:
            result = torch.from_numpy(np.array(read.convert("RGB")))
        return result.permute(2, 0, 1).to(image) / 255


@register
@dataclass(frozen=True)
class Inpainting(Degradation):
    """Straight segments with round ends across the image, all white or all black.

    Args:
        segments: how many, whole numbers.
        thickness: of each, in pixels, whole numbers.
    """

    id = "IN"
    name = "inpainting"
    segments: Range = ranged(5, 10, least=0, most=1e4, whole=True)
    thickness: Range = ranged(5, 10, least=1, most=1e4, whole=True)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        white = draw_whole(generator, (0, 1))
        lines = []
        for _ in range(draw_whole(generator, self.segments)):
            ends = [draw_uniform(generator, (0.0, float(n))) for n in (width, height, width, height)]
            lines.append([*ends, draw_whole(generator, self.thickness)])
        return {"white": bool(white), "lines": lines}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        height, width = image.shape[-2:]
        # on the CPU, so that every device paints the same pixels, and those without float64 too
        y = torch.arange(height, dtype=torch.float64)[:, None] + 0.5
        x = torch.arange(width, dtype=torch.float64)[None, :] + 0.5
        covered = torch.zeros(height, width, dtype=torch.bool)
        for x0, y0, x1, y1, thickness in values["lines"]:
            dx, dy = x1 - x0, y1 - y0
            nearest = (((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-12)).clamp(0, 1)
            covered |= (x - x0 - nearest * dx).square() + (y - y0 - nearest * dy).square() <= thickness**2 / 4
        return image.masked_fill(covered.to(image.device), 1.0 if values["white"] else 0.0)
