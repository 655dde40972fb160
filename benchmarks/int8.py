"""What 8-bit products would cost and could win: ``python -m benchmarks.int8 --clean DIR --calibrate DIR``.

An experiment, whose outcome is in docs/dead-ends.md. Products over channels (1x1 convolutions) are computed from
operands rounded to 8 bits, weights in 255 steps of each output channel, activations in 256 steps of each tensor, whose
range is that of calibration images: the largest and the smallest value (``--cut`` leaves a share of values out at
either end). The sums are exact, as those of an 8-bit instruction are. ``--balance`` moves scale between activations
and weights, channel by channel, as SmoothQuant does (Xiao et al., ICML 2023, equation 4): with 0.5 both have ranges
alike. It prints the PSNR over the middles of the clean images with Gaussian noise, beside float32's and bfloat16's.

What could be won is bounded by the share of a bfloat16 pass that its products take. ``--bound`` times the pass, and
one large matrix product of PyTorch in bfloat16 in turns with it for the rate, and prints that share, and the gain if
8-bit products took half the time of those and if they took none. Rounding activations to 8 bits would cost on top.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mirage.fast
from benchmarks.machine import duration
from mirage.complexity import measure as measure_complexity
from mirage.grids.training import psnr
from mirage.images import read_image
from mirage.restore.loading import load_model
from mirage.train.data.pictures import files_in
from mirage_kernels import _native

STEPS = 255
WEIGHT_STEPS = 127
MATRIX = 2048


class Range:
    """Of what a convolution read: of all values, and of the magnitudes of each channel."""

    def __init__(self, cut: float) -> None:
        self.cut = cut
        self.low, self.high = 0.0, 0.0  # zero is in the range, so that padding and a gate's zeros are exact
        self.channels: Tensor | None = None

    def add(self, x: Tensor) -> None:
        low, high = x.min(), x.max()
        if self.cut:
            values = x.flatten()[:: max(1, x.numel() // 100_000)]
            low, high = torch.quantile(values, torch.tensor([self.cut, 1 - self.cut]))
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        largest = x.abs().amax((0, 2, 3))
        self.channels = largest if self.channels is None else torch.maximum(self.channels, largest)


def products(model: nn.Module) -> Iterator[nn.Conv2d]:
    """The convolutions that mix channels pixel by pixel on whole maps."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and "kernel_generator" not in name:
            yield module


def calibrate(model: nn.Module, images: list[Tensor], cut: float) -> dict[nn.Conv2d, Range]:
    ranges = {conv: Range(cut) for conv in products(model)}
    hooks = [conv.register_forward_pre_hook(lambda conv, x: ranges[conv].add(x[0])) for conv in ranges]
    for image in images:
        model(image)
    for hook in hooks:
        hook.remove()
    return ranges


def quantise(conv: nn.Conv2d, found: Range, balance: float) -> None:
    """Let a convolution round its weights and what it reads to 8 bits."""
    weight = conv.weight.data
    scale = torch.ones(weight.shape[1])
    low, high = found.low, found.high
    if balance:
        assert found.channels is not None
        scale = found.channels.clamp_min(1e-6) ** balance / weight.abs().amax((0, 2, 3)).clamp_min(1e-6) ** (
            1 - balance
        )
        scale = scale / scale.mean()
        # One range for all of the scaled channels. Which sign a channel has is not kept, so the range is symmetric.
        high = float((found.channels / scale).max())
        low = -high if found.low < 0 else 0.0
    weight = weight * scale.view(1, -1, 1, 1)
    step = weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / WEIGHT_STEPS
    conv.weight.data = (weight / step).round() * step
    delta = max(high - low, 1e-12) / STEPS
    zero = round(-low / delta)

    def read(conv: nn.Module, x: tuple[Tensor, ...]) -> Tensor:
        scaled = x[0] / scale.view(1, -1, 1, 1)
        return ((scaled / delta).round() + zero).clamp(0, STEPS).sub(zero) * delta

    conv.register_forward_pre_hook(read)


def as_image(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None]


def middles(folder: Path, side: int, sigma: float, limit: int | None) -> list[tuple[Tensor, Tensor]]:
    """Noisy and clean `[1, 3, side, side]` of the pictures of a folder, in the order of their names."""
    generator = np.random.default_rng(0)
    pairs = []
    for path in files_in(folder)[:limit]:
        pixels = read_image(path).pixels
        top, left = ((n - side) // 2 for n in pixels.shape[:2])
        clean = pixels[top : top + side, left : left + side].astype(np.float64)
        noisy = np.clip(clean + sigma * generator.standard_normal(clean.shape), 0, 255).round()
        pairs.append((as_image(noisy), as_image(clean)))
    return pairs


def mean_psnr(restore: Callable[[Tensor], Tensor], pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Mean over pairs, dB, of results rounded to 8 bits."""
    found = []
    for noisy, clean in pairs:
        restored = restore(noisy).float().clamp(0, 1).mul(255).round().div(255)
        found.append(psnr(clean.numpy(), restored.numpy()))
    return statistics.mean(found)


def accuracy(model: nn.Module, options: argparse.Namespace) -> None:
    pairs = middles(options.clean, options.side, options.sigma, options.limit)
    images = [noisy for noisy, _ in middles(options.calibrate, options.side, options.sigma, options.images)]
    half = mirage.fast.accelerate(copy.deepcopy(model)).bfloat16()
    whole = mean_psnr(model, pairs)
    print(
        f"{len(pairs)} images of {options.side} x {options.side}, sigma {options.sigma:g}, calibrated on {len(images)}"
    )
    print(f"float32         {whole:.3f} dB")
    print(f"bfloat16        {whole - mean_psnr(lambda x: half(x.bfloat16()), pairs):+.3f} dB lost", flush=True)
    for cut, balance in ((0.0, 0.0), (1e-4, 0.0), (0.0, 0.5)):
        rounded = copy.deepcopy(model)
        for conv, found in calibrate(rounded, images, cut).items():
            quantise(conv, found, balance)
        lost = whole - mean_psnr(rounded, pairs)
        print(f"8 bits, cut {cut:g}, balance {balance:g}: {lost:+.3f} dB lost", flush=True)


def bound(model: nn.Module, options: argparse.Namespace) -> None:
    """What 8 bits could win, printed."""
    fast = mirage.fast.accelerate(copy.deepcopy(model)).bfloat16()
    image = torch.rand(1, 3, options.size, options.size, dtype=torch.bfloat16)
    matrix = torch.rand(MATRIX, MATRIX, dtype=torch.bfloat16)
    turns = [(duration(lambda: fast(image)), duration(lambda: matrix @ matrix)) for _ in range(options.turns + 2)][2:]
    whole, product = (statistics.median(column) for column in zip(*turns, strict=True))
    rate = 2 * MATRIX**3 / product / 1e9
    gmacs = measure_complexity(model, (1, 3, options.size, options.size)).gmacs
    share = 2 * gmacs / rate / whole
    where = f"{options.threads} threads, {_native.cpu_isa()}"
    print(f"{options.size} x {options.size}, bfloat16, {where}: {whole * 1e3:.1f} ms")
    print(f"{gmacs:.2f} GMAC at {rate:.0f} GFLOP/s: {share:.0%} of it")
    print(f"products in half their time: {1 / (1 - share / 2):.2f}x; in none: {1 / (1 - share):.2f}x")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="denoise", help="a checkpoint, or the name of packaged weights")
    parser.add_argument("--clean", type=Path, help="folder of clean images to measure on")
    parser.add_argument("--calibrate", type=Path, help="folder of clean images to calibrate on")
    parser.add_argument("--images", type=int, default=16, help="to calibrate on")
    parser.add_argument("--limit", type=int, help="only so many of --clean")
    parser.add_argument("--side", type=int, default=256, help="of the middles, pixels")
    parser.add_argument("--sigma", type=float, default=25.0, help="of the noise, in units of 8 bits")
    parser.add_argument("--bound", action="store_true", help="time a bfloat16 pass and the products in it")
    parser.add_argument("--size", type=int, default=224, help="of the timed image, pixels")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if bool(options.clean) != bool(options.calibrate) or not (options.clean or options.bound):
        parser.error("expected --clean with --calibrate, --bound, or all three")
    torch.set_num_threads(options.threads)
    model = load_model(options.weights, fast=False).float()
    if options.clean:
        accuracy(model, options)
    if options.bound:
        bound(model, options)


if __name__ == "__main__":
    main()
