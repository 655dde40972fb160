"""What choosing an expert costs beside running it: ``python -m benchmarks.unirestorer_router``.

Extractor and router on one image, beside MIRAGE-T (`mirage.fast`) on the same image: processor time (user and system,
all threads), the least of some repetitions taken in turns, and multiply-adds. Random weights cost what trained ones do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

import mirage
from mirage.unirestorer import Router, SmallExtractor, load_extractor

LEAVES, LEVELS = 8, 3
LIMIT = 0.03
"""Of the expert's time, that choosing it shall cost at most."""


@click.command()
@click.option("--size", default=512, show_default=True, type=click.IntRange(min=32), help="Side of the image.")
@click.option("--extractor", help="File or name; without it the small one with random weights.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1))
@torch.no_grad()
def main(size: int, extractor: str | None, repeats: int, threads: int) -> None:
    """Print processor time and multiply-adds of extractor, router and expert, and their ratio."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    image = torch.rand(1, 3, size, size)
    found: Any = SmallExtractor().eval() if extractor is None else load_extractor(extractor)
    groups = [[0, 1 + leaf * (LEVELS + 1) // LEAVES, 1 + LEVELS + 1 + leaf] for leaf in range(LEAVES)]
    router = Router(groups, found.dim).eval()
    network = mirage.fast.accelerate(mirage.mirage_tiny(spd=False).eval())
    embedding = found.embed(image)
    parts: dict[str, Callable[[], Any]] = {
        "extractor": lambda: found.embed(image),
        "router": lambda: router(embedding).expert.tolist(),
        "MIRAGE-T": lambda: network(image),
    }
    seconds = measured(parts, repeats)
    macs = {name: counted(work) for name, work in parts.items()}
    for name in parts:
        print(f"{name:10s} {1000 * seconds[name]:9.2f} ms of processor time  {macs[name] / 1e6:10.2f} M multiply-adds")
    share = (seconds["extractor"] + seconds["router"]) / seconds["MIRAGE-T"]
    counts = (macs["extractor"] + macs["router"]) / macs["MIRAGE-T"]
    verdict = "within" if share <= LIMIT else "above"
    print(f"choosing an expert: {share:.2%} of running it ({verdict} {LIMIT:.0%}), {counts:.2%} of its multiply-adds; "
          f"{size}x{size}, {threads} threads, {describe(found)}")  # fmt: skip


def measured(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least processor seconds of each part, of repetitions in turns; the first one does not count."""
    least = dict.fromkeys(parts, float("inf"))
    for repeat in range(repeats + 1):
        for name, work in parts.items():
            before = time.process_time()
            work()
            if repeat:
                least[name] = min(least[name], time.process_time() - before)
    return least


def counted(work: Callable[[], Any]) -> float:
    """Multiply-adds of a call, as far as PyTorch's counter and the operators of this package tell them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def describe(extractor: Any) -> str:
    view = getattr(extractor, "view", "")
    return f"{type(extractor).__name__}{f', view {view} of {extractor.size}' if view else ''}, dim {extractor.dim}"


if __name__ == "__main__":
    main()
