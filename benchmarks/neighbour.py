"""How much longer a pass takes beside a busy process: ``python -m benchmarks.neighbour``.

MIRAGE-T at 224x224, one pass after another, alone and beside one process that computes without end, in turns of a few
seconds; medians of each, and their ratio. Two threads beside a third on two processors get two thirds of these: 1.5
times as long at best. What it costs beyond that is threads that wait for one another.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial

import torch

import mirage
import mirage.fast
from benchmarks.machine import duration
from mirage_kernels import _native


def passes(model: torch.nn.Module, image: torch.Tensor, seconds: float) -> list[float]:
    """Milliseconds of each pass that begins within so many seconds."""
    found = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        found.append(1e3 * duration(partial(model, image)))
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="MIRAGE-T alone, and beside a busy process")
    parser.add_argument("--size", type=int, default=224, help="side of the image, pixels (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--turns", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4, help="of each turn (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = mirage.fast.accelerate(mirage.mirage_tiny().eval()).to(dtype)
    image = torch.rand(1, 3, options.size, options.size, dtype=dtype)
    passes(model, image, 1)  # the first ones fill caches
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(options.turns):
        alone += passes(model, image, options.seconds)
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.5)
            beside += passes(model, image, options.seconds)
        finally:
            neighbour.kill()
            neighbour.wait()
    first, second = statistics.median(alone), statistics.median(beside)
    print(f"{options.size}x{options.size} {options.dtype}, {options.threads} threads, {_native.cpu_isa()}, ms")
    print(f"alone   {first:8.1f}  of {len(alone)}")
    print(f"beside  {second:8.1f}  of {len(beside)}, {max(beside):.0f} at most")
    print(f"ratio   {second / first:8.2f}")


if __name__ == "__main__":
    main()
