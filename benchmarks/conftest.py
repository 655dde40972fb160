"""Options and facts of a benchmark run; `python -m benchmarks.report` reads what lands in the JSON file."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mirage_kernels

if str(ROOT := Path(__file__).resolve().parent.parent) not in sys.path:
    sys.path.append(str(ROOT))  # for benchmarks.*; an installed mirage goes before the one here


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mirage")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default 2)")
    group.addoption("--peers", default="quick", choices=("quick", "all"), help="all: also the slow to compile")
    group.addoption("--peer-seconds", type=float, default=60, help="time for the rounds of one problem (default 60)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = config.getoption("--device")
    machine_info["mirage"] = {
        "version": mirage_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else machine_info["cpu"].get("brand_raw", "cpu"),
        "threads": torch.get_num_threads(),
        "implementations": mirage_kernels.available(),
        "commit": _commit(),
        "copy_bytes_per_s": copy_bandwidth(device),
        "macs_per_s": matrix_rate(device),
    }


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def timed(benchmark: Any, device: str) -> Callable[[Callable[[], object]], Any]:
    """Time a function of no arguments; on a GPU each call ends with a synchronisation."""

    def run(function: Callable[[], object]) -> Any:
        def call() -> object:
            result = function()
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        call()
        return benchmark(call)

    return run
