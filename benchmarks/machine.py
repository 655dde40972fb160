"""What a benchmark says of the machine and the sources: commit, and rates that times are divided by."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def duration(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best_time(function: Callable[[], object], device: str, runs: int = 12) -> float:
    """Seconds of the best of some runs: a rate of the machine, not a result."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written bytes both counted."""
    source = torch.ones(2**25 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source), device)


def matrix_rate(device: str) -> float:
    """Multiply-adds per second of a float32 matrix product."""
    n = 1536 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    return n**3 / best_time(lambda: a @ b, device)
