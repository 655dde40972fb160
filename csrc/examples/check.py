"""Whether the example in C++ restores photographs as Python does: ``check.py [--cuda] [--small] MIRAGE_RESTORE``.

On the CPU library (without ``--cuda``) the pixels are those of `mirage.restore`, which computes with the same library.
On the CUDA library sums are in another order: what it restores is compared with the network of plain PyTorch modules,
and of the 8-bit values at most one in 200 may differ, by one. ``--small`` takes few pixels, for the emulation of a GPU.

Returns 77 where there is no GPU.
"""

from __future__ import annotations

import argparse
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

SIZES = {False: ((412, 332), (64, 96), (61, 77), (3, 130)), True: ((16, 24), (3, 21))}  # by --small
NO_GPU = ("no CUDA-capable device", "driver version is insufficient")
SKIPPED = 77


def write_pixmap(path: Path, pixels: np.ndarray) -> None:
    """``pixels``: [H, W, 3], uint8."""
    path.write_bytes(b"P6\n# a comment\n%d %d\n255\n" % pixels.shape[1::-1] + pixels.tobytes())


def read_pixmap(path: Path) -> np.ndarray:
    _, size, _, pixels = path.read_bytes().split(b"\n", 3)
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def perturbed(model: torch.nn.Module, pixels: np.ndarray) -> torch.nn.Module:
    """Every parameter and statistic off its initial value, so that one taken for another would show; and what is added
    to the image so small that few results are clipped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(0.05 * (torch.rand(tensor.shape, generator=generator) - 0.5))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        model.output.weight.mul_(0.1 / (model.eval()(image) - image).std())
    return model


def difference(restored: np.ndarray, expected: np.ndarray, rounded: bool) -> tuple[bool, str]:
    """Whether the pixels are right, and how they differ."""
    if restored.shape != expected.shape:
        return False, f"OTHER SIZE {restored.shape}"
    error = np.abs(restored.astype(int) - expected)
    if not error.any():
        return True, "the same pixels"
    right = rounded and error.max() == 1 and error.sum() <= error.size / 200
    return right, f"{'' if right else 'OTHER PIXELS: '}{error.astype(bool).sum()} values differ, by up to {error.max()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    command = [options.program, *(["--cuda"] if options.cuda else [])]
    photograph, failures = data.astronaut(), 0
    with tempfile.TemporaryDirectory() as folder:
        weights, source, target = (Path(folder) / name for name in ("weights.safetensors", "in.ppm", "out.ppm"))
        for build in (mirage.mirage_tiny, mirage.mirage_small):
            torch.manual_seed(0)
            save_checkpoint(perturbed(build(), photograph[100:164, 180:276]), weights)
            model = load_model(weights, fast=not options.cuda)
            for height, width in SIZES[options.small]:
                pixels = np.ascontiguousarray(photograph[100 : 100 + height, 180 : 180 + width])
                write_pixmap(source, pixels)
                ran = subprocess.run([*command, weights, source, target], capture_output=True, text=True)
                if any(reason in ran.stderr for reason in NO_GPU):
                    print(ran.stderr.strip())
                    return SKIPPED
                if ran.returncode:
                    sys.exit(ran.stderr.strip() or f"mirage_restore ended with {ran.returncode}")
                expected = restore_array(model, pixels)
                right, how = difference(read_pixmap(target), expected, rounded=options.cuda)
                print(f"{build.__name__} {height}x{width}: {how}", flush=True)
                unclipped = ((expected > 0) & (expected < 255)).mean()
                failures += not right or unclipped < 0.5 or bool((expected == pixels).all())
        broken = subprocess.run([*command, source, source, target], capture_output=True, text=True)
        print(broken.stderr.strip())
        failures += broken.returncode != 1 or "in.ppm: " not in broken.stderr
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
