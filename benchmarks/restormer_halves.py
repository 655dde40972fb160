"""The feed-forward half of every kind of Restormer's blocks: eager, ours, and the least that its products take.

    OMP_NUM_THREADS=1 python -m benchmarks.restormer_halves --size 256 --dtype float32

Calls alternate, so that what else runs on the machine meets both; medians. The floor is the half's multiply-adds at the
rate of a large product of two matrices of float32 in PyTorch, timed in between: depthwise convolutions and GELUs cannot
reach it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.stages import make_restormer_half, restormer_kinds

SIDE = 1024
"""Of the square matrices whose product gives the rate."""


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def measure(functions: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Medians of alternating calls, for about `budget` seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(times[next(iter(times))]) < 3:
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels (256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--norm", choices=("WithBias", "BiasFree"), default="WithBias")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each kind of block (3)")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    print("channels  size       eager ms    ours ms   eager/ours   floor ms   floor/ours   GMAC/s")
    for kind in restormer_kinds(arguments.size, arguments.size):
        dim, _, height, width = kind
        half = make_restormer_half(kind, arguments.norm, dtype)
        x = torch.randn(1, dim, height, width, dtype=dtype)
        functions = {"eager": partial(half.eager, x), "ours": partial(half.fast, x), "peak": partial(torch.mm, a, b)}
        found = measure(functions, arguments.budget)
        floor = half.macs_forward * found["peak"] / SIDE**3
        print(
            f"{dim:8}  {height}x{width:<6}{1e3 * found['eager']:10.2f} {1e3 * found['ours']:10.2f} "
            f"{found['eager'] / found['ours']:12.2f} {1e3 * floor:10.2f} {floor / found['ours']:12.2f} "
            f"{half.macs_forward / found['ours'] / 1e9:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
