"""Which dtype is fastest on this CPU, measured: a part of ``mirage doctor``.

One of MIRAGE-T's blocks runs in every dtype in turns, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["DtypeSpeed", "compare_dtypes", "fastest"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (1, 48, 96, 96)
ROUNDS = 11
CLEARLY = 1.05
"""How many times as fast as float32 another dtype has to be before it is recommended: less is noise."""


@dataclass(frozen=True)
class DtypeSpeed:
    """The time of a block in one dtype.

    Attributes:
        dtype: such as ``bfloat16``.
        milliseconds: median of the rounds.
        times_float32: how many times as fast as float32: the median, over the rounds, of float32's time by this one's.
    """

    dtype: str
    milliseconds: float
    times_float32: float


def compare_dtypes(
    rounds: int = ROUNDS, clock: Callable[[Callable[[], object]], float] | None = None
) -> tuple[DtypeSpeed, ...]:
    """Time a block of MIRAGE-T (inference, batch 1, 48 channels of 96x96 pixels) in `DTYPES`, float32 first.

    Args:
        rounds: turns of each dtype, after one that fills caches.
        clock: the milliseconds that a call takes; by default those that pass.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    from mirage.blocks import TransformerBlock
    from mirage.fast import accelerate

    clock = clock or _milliseconds
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    block = accelerate(TransformerBlock(SHAPE[1], 1, 2.0, 0.0).eval())
    calls = [_call(copy.deepcopy(block).to(dtype), x.to(dtype)) for dtype in DTYPES]
    for call in calls:
        call()
    turns = [[clock(call) for call in calls] for _ in range(rounds)]
    return tuple(
        DtypeSpeed(
            str(dtype).removeprefix("torch."),
            statistics.median(turn[i] for turn in turns),
            statistics.median(turn[0] / turn[i] for turn in turns),
        )
        for i, dtype in enumerate(DTYPES)
    )


def fastest(speeds: Sequence[DtypeSpeed]) -> str:
    """The name of the dtype to use: float32 unless another is `CLEARLY` faster."""
    best = max(speeds, key=lambda speed: speed.times_float32)
    return best.dtype if best.times_float32 >= CLEARLY else "float32"


def _call(block: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return block(x)

    return run


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
