"""What runs here and whether it is right: ``mirage doctor``.

Versions, devices and implementations, which of these each operator runs on and why not on the others, and what
:mod:`mirage.self_check` finds: the error of every operator on every implementation. ``mirage doctor --gpu`` does so on
a GPU, on images large enough for every kernel there, in all dtypes, and times them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mirage.dtype_speeds import DtypeSpeed, compare_dtypes, fastest
from mirage.self_check import Check, check_operators
from mirage.wording import counted
from mirage_kernels._runtime.processor import cpu_name, cpuinfo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "Check",
    "Choice",
    "DtypeSpeed",
    "Report",
    "check_operators",
    "choices",
    "cpu_name",
    "examine",
    "package_version",
    "render",
]

DISTRIBUTION = "mirage-kernels"
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_FLAGS = "avx2 fma f16c avx512f avx512bw avx512vl avx512_bf16 avx512_fp16 amx_bf16 asimd sve".split()


@dataclass(frozen=True)
class Choice:
    """What an operator runs on by itself on one kind of device, where the sizes of a call do not matter.

    Attributes:
        implementation: its kernels, or ``"torch"``.
        why_not: for each of the other kernels the reason.
    """

    operator: str
    device: str
    implementation: str
    why_not: dict[str, str]


@dataclass(frozen=True)
class Report:
    """Everything ``mirage doctor`` found."""

    versions: dict[str, str]
    devices: list[dict[str, Any]]
    implementations: dict[str, str]
    checks: tuple[Check, ...]
    choices: tuple[Choice, ...] = ()
    dtypes: tuple[DtypeSpeed, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {**asdict(self), "checks": checks, "healthy": self.healthy}


def examine(*, check: bool = True, gpu: bool = False) -> Report:
    """Collect versions, devices and implementations, and with ``check`` run :func:`check_operators` and, where the CPU
    has kernels, :func:`mirage.dtype_speeds.compare_dtypes`.

    Args:
        gpu: check what runs on a GPU, in `GPU_DTYPES` on large images, and time it.
    """
    import mirage_kernels

    run = partial(check_operators, None, "cuda", GPU_DTYPES, timed=True, large=True) if gpu else check_operators
    return Report(
        versions=_versions(),
        devices=_devices(),
        implementations=dict(mirage_kernels.available()),
        checks=run() if check else (),
        choices=choices(),
        dtypes=compare_dtypes() if check and not gpu and mirage_kernels.available()["cpp"] == "yes" else (),
    )


def choices() -> tuple[Choice, ...]:
    """What every operator runs on here, on the CPU and on a GPU if there is one."""
    from mirage_kernels._runtime import dispatch
    from mirage_kernels._runtime.cases import operators

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    declined = {operator.name: operator.declined for operator in operators() if not operator.mode}
    return tuple(
        Choice(name, device, *dispatch.outlook(device, of_operator))
        for device in devices
        for name, of_operator in declined.items()
    )


def package_version() -> str:
    """Version of the installed distribution, or of the source tree where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        import mirage_kernels

        return f"{getattr(mirage_kernels, '__version__', 'unknown')} (not installed)"


def _versions() -> dict[str, str]:
    from mirage_kernels._runtime.dispatch import triton_version

    versions = {DISTRIBUTION: package_version(), "python": platform.python_version(), "torch": torch.__version__}
    versions["triton"] = triton_version() or "not installed"
    for name in ("numpy", "pillow", "imagecodecs", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.version.cuda or (f"HIP {torch.version.hip}" if torch.version.hip else None)
    versions["CUDA of torch"] = cuda or "none (CPU build)"
    versions["platform"] = platform.platform()
    return versions


def _instruction_set() -> dict[str, str]:
    """That of the C++ kernels, the built-in choice where it is another, and why bfloat16 is not multiplied in tiles;
    nothing where they are not built."""
    import mirage_kernels

    if mirage_kernels.available()["cpp"] != "yes":
        return {}
    native = importlib.import_module("mirage_kernels._native")
    found = {"instruction set": native.cpu_isa()}
    if native.built_in_cpu_isa() != native.cpu_isa():
        by = "MIRAGE_CPU_ISA" if os.environ.get("MIRAGE_CPU_ISA") else "MIRAGE_TUNING"
        found["chosen by"] = f"{by}; by itself {native.built_in_cpu_isa()} runs"
    if reason := native.why_no_tiles():
        found["without AMX"] = reason
    return found


def _devices() -> list[dict[str, Any]]:
    present = set(cpuinfo("flags", "Features").split())
    cpu = {
        "device": "cpu",
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "vector level of torch": torch.backends.cpu.get_cpu_capability(),
        "features": " ".join(flag for flag in CPU_FLAGS if flag in present),
        **_instruction_set(),
    }
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory MiB": properties.total_memory >> 20,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return [cpu, *gpus]


def _choices_table(made: tuple[Choice, ...]) -> Table:
    """One row for all operators that run on the same, for the same reasons."""
    from rich.table import Table
    from rich.text import Text

    table = Table("Operator", "Device", "Runs on", "Why not the others", title="Choices", title_justify="left")
    alike: dict[tuple[str, str, str], list[str]] = {}
    for choice in made:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in choice.why_not.items())
        alike.setdefault((choice.device, choice.implementation, reasons), []).append(choice.operator)
    for (device, implementation, reasons), names in alike.items():
        table.add_row(Text("\n".join(names)), device, implementation, Text(reasons))
    return table


def _dtypes_table(speeds: tuple[DtypeSpeed, ...]) -> Table:
    """One row a dtype; the title says which to use."""
    from rich.table import Table

    title = f"Dtypes of a block of MIRAGE-T on the CPU: {fastest(speeds)} is the fastest"
    table = Table("Dtype", title=title, title_justify="left")
    table.add_column("ms", justify="right")
    table.add_column("Times float32's speed", justify="right")
    for speed in speeds:
        table.add_row(speed.dtype, f"{speed.milliseconds:.2f}", f"{speed.times_float32:.2f}")
    return table


def render(report: Report, console: Console) -> None:
    """Print the report to a rich console."""
    from rich.table import Table
    from rich.text import Text

    def two_columns(title: str, pairs) -> None:
        table = Table(title=title, title_justify="left", show_header=False)
        for key, value in pairs:
            table.add_row(Text(str(key)), Text(str(value)))
        console.print(table)

    two_columns("Versions", report.versions.items())
    for device in report.devices:
        two_columns(device["device"], ((k, v) for k, v in device.items() if k != "device"))
    two_columns("Implementations", report.implementations.items())
    console.print(_choices_table(report.choices))
    if report.dtypes:
        console.print(_dtypes_table(report.dtypes))
    if not report.checks:
        return
    table = Table(title="Operators against float64 (forward and backward)", title_justify="left")
    timed = any(check.milliseconds is not None for check in report.checks)
    columns = ("Operator", "Implementation", "Device", "Dtype", "Worst error", "Allowed", "In", "Result")
    for column in (*columns, "ms") if timed else columns:
        table.add_column(column, justify="right" if column in ("Worst error", "Allowed", "ms") else "left")
    for check in report.checks:
        error, limit = (f"{v:.1e}" if v is not None else "-" for v in (check.error, check.limit))
        result = Text("ok", "green") if check.passed else Text(check.problem or "too far off", "bold red")
        time = [] if not timed else ["-" if check.milliseconds is None else f"{check.milliseconds:.3f}"]
        where = (check.operator, check.implementation, check.device, check.dtype)
        table.add_row(*where, error, limit, check.where, result, *time)
    console.print(table)
    failed = sum(not check.passed for check in report.checks)
    console.print(f"{counted(len(report.checks), 'check')}{f', {failed} failed' if failed else ' passed'}")
