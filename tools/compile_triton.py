"""Compile every Triton launch of mirage_kernels for GPUs that are not there, and report registers and spills.

    python -m tools.compile_triton --target sm_80 sm_90 gfx942 [--operator NAME ...] [--case WORD ...] [--sass]
                                   [--json | --summary]

Exit status 1 if a launch fails to compile, spills registers to memory, or wants more shared memory than the GPU has.
NVIDIA's compiler spills up to 16 bytes a thread also where there are registers left, so that one more program fits on a
multiprocessor. That is its choice and no failure: such launches are counted apart, as traded.
--sass also disassembles NVIDIA's binaries: how many tensor-core instructions, and how many loads from global memory of
each width (bytes a thread), there are. --summary prints one row for each kernel: the most of its binaries.

Every operator takes part that has an implementation in Triton (`implementations` in its ``cases.py``): forward and
backward run on tensors without memory, at the shapes of MIRAGE-T and MIRAGE-S and at those that the case adds, in each
dtype, and once with strides that need 64-bit offsets. Nothing is launched: `launch_hook` of
``mirage_kernels._triton.launch`` compiles what would have been, with the specialisation (alignment, integers equal to
one) that Triton would choose for these arguments. Cases run under both float32 matmul precisions. What compiles to the
same binary is compiled and listed once. An operator that launches nothing counts as a failure.
"""

from __future__ import annotations

import argparse
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
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: interpreted kernels cannot be compiled

import torch  # noqa: E402

from mirage_kernels._runtime import cases  # noqa: E402
from mirage_kernels._runtime.tuning import FP_FUSION  # noqa: E402
from tools.cuda_resources import SHARED, blocks_of  # noqa: E402
from tools.meta_device import Operators, launching  # noqa: E402

TARGETS = ("sm_80", "sm_90", "gfx942")
DTYPES = ("float32", "float16", "bfloat16")
IMAGE = 224  # the side, in pixels
TRADED = 16  # bytes of a thread that the compiler gives up for one more program of a multiprocessor, at most
MOST_REGISTERS = 255  # of a thread
SHARED_LIMIT = {"gfx942": 64 * 1024} | {gpu: of_a_block for gpu, (of_a_block, _) in SHARED.items()}  # bytes


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
    tensor_cores: int | None = None  # instructions; None where the binary was not disassembled
    loads: dict[int, int] | None = None  # instructions by bytes per thread
    error: str = ""

    @property
    def traded(self) -> bool:
        """Whether with the spilled registers fewer programs would fit on a multiprocessor."""
        if self.target.startswith("gfx") or not 0 < self.spills <= TRADED:
            return False
        wanted = self.registers + self.spills // 4
        return wanted <= MOST_REGISTERS and self._programs(self.registers) > self._programs(wanted)

    def _programs(self, registers: int) -> int:
        return blocks_of(self.target, registers, self.shared, 32 * self.warps)

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.spills and not self.traded:
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
        return torch.device("meta")

    def compile(self, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The binary of a launch, with the arguments of the hook of `mirage_kernels._triton.launch`."""
        from triton.runtime import driver

        driver.set_active(self)
        return kernel.warmup(*args, grid=(programs,), **options, **FP_FUSION)


class Compiler:
    """A launch hook that compiles for `target` and keeps a row for each distinct binary."""

    def __init__(self, target: str, operator: str, sass: bool = False) -> None:
        self.rows: list[Row] = []
        self.case = ""
        self._target, self._operator, self._sass = target, operator, sass
        self._driver = AbsentDriver(target)
        self._seen: set[str] = set()

    def __call__(self, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = kernel.__name__
        try:
            binary = self._driver.compile(kernel, programs, args, options)
        except Exception as error:  # whatever the compiler raises is this launch's result
            self.fail(name, error)
            return
        if binary.hash not in self._seen:
            self._seen.add(binary.hash)
            shape = {"warps": binary.metadata.num_warps, "blocks": programs, "shared": binary.metadata.shared}
            facts = resources(binary) | (instructions(binary) if self._sass and "cubin" in binary.asm else {})
            self.rows.append(Row(self._target, self._operator, name, self.case, **facts, **shape))

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
    text = run_on_binary(binary, "cuobjdump", "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}


def instructions(binary: Any) -> dict[str, Any]:
    """Tensor-core instructions, and loads from global memory by bytes per thread, in the disassembly."""
    text = run_on_binary(binary, "nvdisasm", "-c")
    loads: dict[int, int] = {}
    for name in re.findall(r"\b(?:LDG|LDGSTS)\.[.\w]*", text):
        parts = name.split(".")
        bits = next((int(p) for p in parts if p in ("64", "128")), None)
        width = bits // 8 if bits else 2 if {"U16", "S16"} & set(parts) else 1 if {"U8", "S8"} & set(parts) else 4
        loads[width] = loads.get(width, 0) + 1
    tensor_cores = len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|IMMA)\.", text))
    return {"tensor_cores": tensor_cores, "loads": dict(sorted(loads.items()))}


def run_on_binary(binary: Any, tool: str, *options: str) -> str:
    """What a tool of NVIDIA's, which Triton's wheel brings, prints about a cubin."""
    from triton.backends import nvidia

    (folder,) = nvidia.__path__
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [os.path.join(folder, "bin", tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def operators() -> list[str]:
    """Those with kernels in Triton of their own."""
    own = (op for op in cases.operators() if "triton" in op.implementations and not op.is_chain_on_gpus)
    return list(dict.fromkeys(op.name for op in own if op.gradients))


def variants(operator: cases.Operator) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(label, arguments): every width of both networks in float32, the widest of each and what the case adds in all
    dtypes, of stages all in all dtypes; and one with 64-bit offsets. Of a mode of an operator what its case adds."""
    networks = [] if operator.mode else [operator.in_network(dim, IMAGE) for dim in cases.DIMS.values()]
    shapes = dict.fromkeys((*(shape for network in networks for shape in network), *operator.compiled))
    widest = {max(network, key=lambda shape: shape[1]) for network in networks}
    in_all = shapes.keys() if operator.is_stage else widest | set(operator.compiled)
    chosen = [(shape, dtype, False) for dtype in DTYPES for shape in shapes if dtype == "float32" or shape in in_all]
    if networks:  # of stages one that is not so wide that registers spill anyway
        chosen.append((networks[0][3] if operator.is_stage else max(widest), "float32", True))
    for shape, dtype, far in chosen:
        _, channels, height, width, *rest = shape
        words = [dtype, f"C={channels}", f"{height}x{width}", *map(str, rest), operator.mode, "int64" if far else ""]
        yield " ".join(filter(None, words)), operator.without_memory(shape, getattr(torch, dtype), far)


def compile_operator(name: str, target: str, sass: bool = False, words: frozenset[str] = frozenset()) -> list[Row]:
    """All launches of one operator's cases, of those that have the `words` in their labels."""
    compiler = Compiler(target, name, sass)
    try:
        with launching(compiler), Operators():
            for operator in cases.operators([name]):
                for label, tensors in variants(operator):
                    if not words.issubset(label.split()):
                        continue
                    compiler.case = label
                    for precision in ("highest", "high"):
                        torch.set_float32_matmul_precision(precision)
                        output = operator.public(*(t.requires_grad_() for t in tensors))
                        torch.autograd.grad(output, tensors, torch.empty_like(output))
        if not compiler.rows:
            raise RuntimeError("its cases launched no kernel")
    except Exception as error:  # one operator's mistake must not hide the others' rows
        compiler.fail("-", error)
    finally:
        torch.set_float32_matmul_precision("highest")
    return compiler.rows


def compile_all(
    names: Iterable[str], targets: Iterable[str], jobs: int, sass: bool, words: Iterable[str] = ()
) -> Iterator[Row]:
    pairs = [(name, target, sass, frozenset(words)) for name in names for target in targets]
    if jobs <= 1:
        for pair in pairs:
            yield from compile_operator(*pair)
        return
    # Fresh processes: a fork would share the compiler's and PyTorch's threads.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        longest_first = sorted(pairs, key=lambda pair: not pair[0].endswith("_stage"))
        futures = {pair: pool.submit(compile_operator, *pair) for pair in longest_first}
        for pair in pairs:
            yield from futures[pair].result()


def print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Triton kernels, compiled offline")
    for heading in ("target", "operator", "kernel", "case"):
        table.add_column(heading, overflow="fold")
    headings = ["registers", "spills [B]", "shared [B]", "warps", "blocks"]
    if any(row.loads is not None for row in rows):
        headings += ["tensor cores", "loads by bytes"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        loads = " ".join(f"{width}:{count}" for width, count in (row.loads or {}).items())
        last = ("-" if row.tensor_cores is None else row.tensor_cores, loads)
        numbers = (row.registers, row.spills, row.shared, row.warps, row.blocks, *last)[: len(headings)]
        style = "red" if row.problem else None
        table.add_row(row.target, row.operator, row.kernel, row.case, *map(str, numbers), style=style)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table)
    for row in rows:
        if row.problem:
            place = " ".join((row.target, row.operator, row.kernel, row.case))
            console.print(f"{place}: {row.problem}", style="red", markup=False)


def summary(rows: list[Row], targets: list[str]) -> list[list[Any]]:
    """For each kernel of each operator: binaries, the most registers, spills and KiB of a target's, and, of what was
    disassembled, how many of sm_90's binaries have tensor-core instructions, and their loads by bytes per thread."""
    table, sass = [], any(row.target == "sm_90" and row.loads is not None for row in rows)
    for operator, kernel in dict.fromkeys((row.operator, row.kernel) for row in rows):
        own = [row for row in rows if (row.operator, row.kernel) == (operator, kernel)]
        line: list[Any] = [operator, kernel, sum(not row.error for row in own)]
        for target in targets:
            of_target = [row for row in own if row.target == target]
            for field in ("registers", "spills", "shared"):
                line.append(max((getattr(row, field) for row in of_target), default="-"))
            if of_target:
                line[-1] = f"{line[-1] / 1024:.1f}"
        if sass:
            disassembled = [row for row in own if row.target == "sm_90" and not row.error]
            loads: dict[int, int] = {}
            for width, count in (pair for row in disassembled for pair in (row.loads or {}).items()):
                loads[width] = loads.get(width, 0) + count
            line.append(f"{sum(bool(row.tensor_cores) for row in disassembled)} of {len(disassembled)}")
            line.append(" ".join(f"{width}:{loads[width]}" for width in sorted(loads)))
        table.append(line)
    return table


def print_summary(rows: list[Row], targets: list[str]) -> None:
    table = summary(rows, targets)
    headings = [name for target in targets for name in (f"{target}: registers", "spilled B", "shared KiB")]
    headings += ["sm_90: tensor cores", "loads by bytes"] if table and len(table[0]) > 3 + len(headings) else []
    print("| operator | kernel | binaries |", " | ".join(headings), "|")
    print("|---|---|---:|" + "---:|" * len(headings))
    for line in table:
        print("|", " | ".join(map(str, line)), "|")
    for row in rows:
        if row.problem:
            print(" ".join((row.target, row.operator, row.kernel, row.case)) + f": {row.problem}")
    print()


def main(argv: list[str] | None = None) -> int:
    known = operators()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET",
                        help=f"any of {', '.join(TARGETS)} (default: all)")  # fmt: skip
    parser.add_argument("--operator", nargs="+", choices=known, default=known, metavar="NAME",
                        help=f"any of {', '.join(known)} (default: all)")  # fmt: skip
    parser.add_argument("--case", nargs="+", default=(), metavar="WORD",
                        help="only cases with all of these words, such as float32 C=24 int64")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per processor)")
    parser.add_argument("--sass", action="store_true", help="disassemble: tensor-core instructions and widths of loads")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--summary", action="store_true", help="print a row for each kernel, as a table in markdown")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    rows = list(compile_all(options.operator, options.target, options.jobs, options.sass, options.case))
    failures = sum(bool(row.problem) for row in rows)
    if options.json:
        print(json.dumps([asdict(row) | {"problem": row.problem, "traded": row.traded} for row in rows], indent=1))
    else:
        print_summary(rows, options.target) if options.summary else print_table(rows)
        seconds = time.perf_counter() - start
        traded = sum(row.traded for row in rows)
        print(f"{len(rows)} kernels, {failures} with problems, {traded} with registers traded, {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
