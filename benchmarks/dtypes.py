"""float32 and bfloat16 in turns: how much faster a pass of the fast network is in bfloat16 on this CPU.

    python -m benchmarks.dtypes --seconds 20

A pass in one dtype follows a pass in the other, so that what else the machine does meets both. `ratio` is the median of
float32's time by bfloat16's over the pairs, with the least and the largest. MIRAGE_CPU_ISA lowers the instruction set.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from functools import partial

import torch

import mirage
import mirage.fast
from benchmarks.machine import duration
from mirage_kernels import _native

MODELS = {"MIRAGE-T": mirage.mirage_tiny, "MIRAGE-S": mirage.mirage_small}
SIZES = ((224, 224), (512, 768))


@torch.inference_mode()
def pairs(name: str, size: tuple[int, int], seconds: float) -> list[tuple[float, float]]:
    """Milliseconds in float32 and in bfloat16, pair after pair for at least `seconds`; at least one pair."""
    torch.manual_seed(0)
    model = mirage.fast.accelerate(MODELS[name]().eval())
    half = copy.deepcopy(model).bfloat16()
    image = torch.rand(1, 3, *size)
    found = []
    end = 0.0
    while not found or time.monotonic() < end:
        pair = 1e3 * duration(partial(model, image)), 1e3 * duration(partial(half, image.bfloat16()))
        if end:
            found.append(pair)
        else:  # the first passes fill caches
            end = time.monotonic() + seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="float32 and bfloat16 in turns")
    parser.add_argument("--seconds", type=float, default=20, help="for each network and size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", choices=["x".join(map(str, s)) for s in SIZES], default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{_native.cpu_isa()}, {arguments.threads} threads, milliseconds")
    for size in SIZES:
        text = "x".join(map(str, size))
        if arguments.sizes and text not in arguments.sizes:
            continue
        for name in arguments.models:
            found = pairs(name, size, arguments.seconds)
            single, half = (statistics.median(times) for times in zip(*found, strict=True))
            ratios = [a / b for a, b in found]
            print(
                f"{name} {text}: float32 {single:.0f}, bfloat16 {half:.0f}, ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}), {len(found)} pairs",
                flush=True,
            )


if __name__ == "__main__":
    main()
