"""Options and facts of a benchmark run; `python -m benchmarks.report` reads what lands in the JSON file."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mirage_kernels
from mirage_kernels._runtime import dispatch

if str(ROOT := Path(__file__).resolve().parent.parent) not in sys.path:
    sys.path.append(str(ROOT))  # for benchmarks.*; an installed mirage goes before the one here

from benchmarks.machine import commit, copy_bandwidth, matrix_rate  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mirage")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default 2)")
    what = "all: also the slow to compile; trial: tiny networks and images, to try a run"
    group.addoption("--peers", default="quick", choices=("quick", "all", "trial"), help=what)
    group.addoption("--networks", default="all", help="of benchmarks/networks.py, with commas between (default all)")
    group.addoption("--code", default="", help="folder with checkouts of AdaIR and MoCE-IR, whose code is run")
    group.addoption("--peer-seconds", type=float, default=60, help="time for the rounds of one problem (default 60)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    torch.manual_seed(0)


def _processor(cpu: dict[str, Any]) -> str:
    """Its name, which is that of several generations, and the instruction set that our kernels use on it."""
    name = cpu.get("brand_raw", "cpu")
    return f"{name} ({dispatch.native.cpu_isa()})" if dispatch.native else name


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = config.getoption("--device")
    machine_info["mirage"] = {
        "version": mirage_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(machine_info["cpu"]),
        "threads": torch.get_num_threads(),
        "implementations": mirage_kernels.available(),
        "commit": commit(),
        "copy_bytes_per_s": copy_bandwidth(device),
        "macs_per_s": matrix_rate(device),
    }


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
