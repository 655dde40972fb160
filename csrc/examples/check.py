"""Whether the example in C++ restores a photograph to the same pixels as Python: ``check.py MIRAGE_RESTORE``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from skimage import data

import mirage
from mirage.checkpoint import save_checkpoint
from mirage.restore import load_model, restore_array


def write_pixmap(path: Path, pixels: np.ndarray) -> None:
    """``pixels``: [H, W, 3], uint8."""
    path.write_bytes(b"P6\n# a comment\n%d %d\n255\n" % pixels.shape[1::-1] + pixels.tobytes())


def read_pixmap(path: Path) -> np.ndarray:
    _, size, _, pixels = path.read_bytes().split(b"\n", 3)
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and statistic off its initial value, so that one taken for another would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return model


def main(program: str) -> int:
    photograph, failures = data.astronaut(), 0
    with tempfile.TemporaryDirectory() as folder:
        weights, source, target = (Path(folder) / name for name in ("weights.safetensors", "in.ppm", "out.ppm"))
        for build in (mirage.mirage_tiny, mirage.mirage_small):
            torch.manual_seed(0)
            save_checkpoint(perturbed(build()), weights)
            model = load_model(weights)
            for height, width in ((64, 96), (61, 77), (3, 130)):
                pixels = np.ascontiguousarray(photograph[100 : 100 + height, 180 : 180 + width])
                write_pixmap(source, pixels)
                subprocess.run([program, weights, source, target], check=True)
                expected, restored = restore_array(model, pixels), read_pixmap(target)
                same = restored.shape == expected.shape and bool((restored == expected).all())
                changed = bool((expected != pixels).any())
                print(f"{build.__name__} {height}x{width}: {'the same pixels' if same else 'OTHER PIXELS'}")
                failures += not (same and changed)
        broken = subprocess.run([program, source, source, target], capture_output=True, text=True)
        print(broken.stderr.strip())
        failures += broken.returncode != 1 or "in.ppm: " not in broken.stderr
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
