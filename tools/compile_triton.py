"""Compile every Triton launch of mirage_kernels for GPUs that are not there, and report registers and spills.

    python tools/compile_triton.py --target sm_80 sm_90 gfx942 [--operator NAME ...] [--json]

Exit status 1 if a launch fails to compile, spills registers to memory, or wants more shared memory than the GPU has.

How an operator takes part: its ``triton_kernels.py`` defines ``triton_cases()``, a generator of pairs

    (label, call)    label: dtype and shape, for the table; call: a function without arguments

where ``call`` runs the operator's ``forward`` or ``backward`` (or both) on tensors of the meta device, which have
shapes and strides but no memory. ``mirage_kernels._triton_cases`` makes such tensors at the shapes of MIRAGE-T and
MIRAGE-S in each dtype, and tensors whose reach needs 64-bit offsets. Nothing is launched: the hook of
``mirage_kernels._triton.launch`` compiles what would have been, with the specialisation (alignment, integers equal
to one) that Triton would choose for these arguments. Cases run under both float32 matmul precisions. What compiles to
the same binary is compiled and listed once, so cases may overlap freely. An operator with a ``triton_kernels.py`` but
without ``triton_cases`` counts as a failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "gfx942")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that one block may have


@dataclass(frozen=True)
class Row:
    """One compiled launch, or the reason why there is none."""

    target: str
    operator: str
    kernel: str
    case: str
    registers: int = 0  # per thread
    spills: int = 0  # bytes per thread
    shared: int = 0  # bytes per block
    warps: int = 0
    blocks: int = 0
    error: str = ""

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} bytes per thread"
        limit = SHARED_LIMIT[self.target]
        return f"wants {self.shared} bytes of shared memory, the GPU has {limit}" if self.shared > limit else ""


class AbsentDriver:
    """Answers what Triton asks a GPU driver before compiling, for a GPU of the given target."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._device = TARGETS.index(target)  # Triton caches compiled kernels by device
        amd = target.startswith("gfx")
        self._target = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")


class Compiler:
    """A launch hook that compiles for `target` and keeps a row for each distinct binary."""

    def __init__(self, target: str, operator: str) -> None:
        self.rows: list[Row] = []
        self.case = ""
        self._target, self._operator = target, operator
        self._driver = AbsentDriver(target)
        self._seen: set[str] = set()

    def __call__(self, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        from triton.runtime import driver

        name = kernel.__name__
        driver.set_active(self._driver)
        try:
            binary = kernel.warmup(*args, grid=(programs,), **options)
        except Exception as error:  # whatever the compiler raises is this launch's result
            self.fail(name, error)
            return
        if binary.hash not in self._seen:
            self._seen.add(binary.hash)
            shape = {"warps": binary.metadata.num_warps, "blocks": programs, "shared": binary.metadata.shared}
            self.rows.append(Row(self._target, self._operator, name, self.case, **resources(binary), **shape))

    def fail(self, kernel: str, error: Exception) -> None:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        text = f"{type(error).__name__}: {lines[-1].strip()}"
        self.rows.append(Row(self._target, self._operator, kernel, self.case, error=text))


def resources(binary: Any) -> dict[str, int]:
    """Registers per thread and bytes of memory that spilled ones take, read from the binary."""
    if "amdgcn" in binary.asm:
        counts = dict(re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)",
                                 binary.asm["amdgcn"], re.M))  # fmt: skip
        spills = max(4 * int(counts["vgpr_spill_count"]), int(counts["private_segment_fixed_size"]))
        return {"registers": int(counts["vgpr_count"]), "spills": spills}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}


def cuobjdump() -> str:
    """The path of cuobjdump, which Triton's wheel brings."""
    from triton.backends import nvidia

    (folder,) = nvidia.__path__
    return os.path.join(folder, "bin", "cuobjdump")


def operators() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "mirage_kernels").glob("*/triton_kernels.py"))


def compile_operator(operator: str, target: str) -> list[Row]:
    """All launches of one operator's cases."""
    import torch

    from mirage_kernels import _triton

    compiler = Compiler(target, operator)
    _triton.launch_hook = compiler
    try:
        module = importlib.import_module(f"mirage_kernels.{operator}.triton_kernels")
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for compiler.case, call in module.triton_cases():
                call()
        if not compiler.rows:
            raise RuntimeError("triton_cases() launched no kernel")
    except Exception as error:  # one operator's mistake must not hide the others' rows
        compiler.fail("-", error)
    finally:
        _triton.launch_hook = None
        torch.set_float32_matmul_precision("highest")
    return compiler.rows


def compile_all(names: Iterable[str], targets: Iterable[str], jobs: int) -> Iterator[Row]:
    pairs = [(name, target) for name in names for target in targets]
    if jobs <= 1:
        for name, target in pairs:
            yield from compile_operator(name, target)
        return
    # Fresh processes: a fork would share the compiler's and PyTorch's threads.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compile_operator, *pair) for pair in pairs]:
            yield from future.result()


def print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Triton kernels, compiled offline")
    for heading in ("target", "operator", "kernel", "case"):
        table.add_column(heading, overflow="fold")
    for heading in ("registers", "spills [B]", "shared [B]", "warps", "blocks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = (row.registers, row.spills, row.shared, row.warps, row.blocks)
        style = "red" if row.problem else None
        table.add_row(row.target, row.operator, row.kernel, row.case, *map(str, numbers), style=style)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table)
    for row in rows:
        if row.problem:
            place = " ".join((row.target, row.operator, row.kernel, row.case))
            console.print(f"{place}: {row.problem}", style="red", markup=False)


def main(argv: list[str] | None = None) -> int:
    known = operators()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET",
                        help=f"any of {', '.join(TARGETS)} (default: all)")  # fmt: skip
    parser.add_argument("--operator", nargs="+", choices=known, default=known, metavar="NAME",
                        help=f"any of {', '.join(known)} (default: all)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per processor)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    rows = list(compile_all(options.operator, options.target, options.jobs))
    failures = sum(bool(row.problem) for row in rows)
    if options.json:
        print(json.dumps([asdict(row) | {"problem": row.problem} for row in rows], indent=1))
    else:
        print_table(rows)
        seconds = time.perf_counter() - start
        print(f"{len(rows)} kernels, {failures} with problems, {seconds:.0f} s")
    return 1 if failures else 0


# Before Triton is imported, in this process and in the workers: interpreted kernels cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    sys.exit(main())
