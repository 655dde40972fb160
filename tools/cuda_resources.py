"""What nvcc has made of the kernels in CUDA C++: registers, spills, shared memory, occupancy, and instructions.

    python tools/cuda_resources.py [--sass] [--summary | --json] [FILE ...]

FILE: an extension module or an object file; without any, the mirage_kernels/_cuda*.so that the build has left. There is
a row for each kernel and architecture. Threads and dynamic shared memory are not written in a binary: they are what the
library says it launches (csrc/common/cuda/registry.h, the modules' ``kernels()``). Occupancy is how many blocks a
multiprocessor runs at once, by registers, shared memory and threads, and the part of its 64 warps that they are.

Exit status 1 if a kernel spills (local memory or stack), wants more shared memory than the GPU has, or is not listed by
``kernels()``, and if there is no kernel. ``kernels()`` also names the oldest GPU that the library launches a kernel on.
On GPUs older than that it may spill, and is a failure if it would fit into their shared memory. --sass also
disassembles, and counts instructions.

No GPU is needed. cuobjdump is that of Triton's wheel, or the one in PATH.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"sm_80": (163 * 1024, 164 * 1024), "sm_90": (227 * 1024, 228 * 1024)}  # bytes: a block's, a multiprocessor's
RESERVED = 1024  # of it, by the system for each block
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor
COUNTED = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UBLKCP", "LDL", "STL")
INSTRUCTION = 16  # bytes
LOOP = "longest loop"  # instructions from where the longest jump back leads to that jump
ALL = "all"  # instructions, however often each is executed


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture, as the binary has it."""

    arch: str
    symbol: str
    registers: int  # per thread
    stack: int  # bytes per thread, as is local
    local: int
    static_shared: int  # bytes per block
    instructions: dict[str, int] | None = None  # None where it was not disassembled
    loads: dict[int, int] | None = None  # from global memory, by bytes per thread


@dataclass(frozen=True)
class Row:
    """The same with how it is launched; None where the library does not say."""

    kernel: str
    code: Code
    threads: int | None = None
    dynamic_shared: int | None = None
    refused: bool = False  # the library does not launch it on this GPU, which has too little shared memory

    @property
    def gpu(self) -> str:
        return gpu_of(self.code.arch)

    @property
    def blocks(self) -> int | None:
        if self.threads is None or self.gpu not in SHARED:
            return None
        return blocks_of(self.gpu, self.code.registers, self.code.static_shared + self.dynamic_shared, self.threads)

    @property
    def occupancy(self) -> float | None:
        """Percent."""
        return None if self.blocks is None else 100 * self.blocks * warps_of(self.threads) / WARPS

    @property
    def too_large(self) -> bool:
        shared = self.code.static_shared + (self.dynamic_shared or 0)
        return self.gpu in SHARED and shared > SHARED[self.gpu][0]

    @property
    def problem(self) -> str:
        found = []
        if self.gpu not in SHARED:
            found.append(f"the limits of {self.code.arch} are not known here")
        if self.threads is None:
            found.append("not listed by kernels(), see MIRAGE_KERNELS in csrc/common/cuda/registry.h")
        if (self.code.stack or self.code.local) and not self.refused:
            found.append(f"{self.code.stack} bytes of stack and {self.code.local} of local memory per thread")
        if self.too_large and not self.refused:
            shared = self.code.static_shared + (self.dynamic_shared or 0)
            found.append(f"wants {shared} bytes of shared memory, the GPU has {SHARED[self.gpu][0]}")
        if self.refused and not self.too_large:
            found.append("listed for newer GPUs alone, but this one has its shared memory")
        if self.blocks == 0 and not self.too_large:
            found.append("a multiprocessor has not the registers or threads of one block")
        return "; ".join(found)

    def facts(self) -> dict[str, Any]:
        facts = {"kernel": self.kernel} | asdict(self.code)
        facts |= {"dynamic_shared": self.dynamic_shared, "threads": self.threads, "blocks": self.blocks}
        return facts | {"occupancy": self.occupancy, "refused": self.refused, "problem": self.problem}


def gpu_of(arch: str) -> str:
    return arch.rstrip("af")  # sm_90a has the limits of sm_90


def warps_of(threads: int) -> int:
    return -(-threads // 32)


def blocks_of(gpu: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor runs at once, as NVIDIA's occupancy calculator has it."""
    block_limit, limit = SHARED[gpu]
    if shared > block_limit:
        return 0
    warps = warps_of(threads)
    by_warps = WARPS // warps
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = REGISTERS // of_a_warp // 4 * 4 // warps  # a quarter of the registers is for a quarter of the warps
    of_a_block = -(-(shared + RESERVED) // 128) * 128
    return min(BLOCKS, by_warps, by_registers, limit // of_a_block)


# ---- names ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(None)
def demangled(symbol: str) -> str:
    """As the C++ runtime has it; the symbol itself where there is none, or the symbol is not C++."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
        free = ctypes.CDLL(None)["free"]
    except (OSError, AttributeError):
        return symbol
    demangle.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    text = demangle(symbol.encode(), None, None, None)
    if not text:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        free(text)


def short_name(symbol: str) -> str:
    """Name and template arguments, as csrc/common/cuda/registry.h writes them."""
    text = demangled(symbol).replace("mirage::cuda::", "").removeprefix("void ")
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return text[:i]
    return text


# ---- binaries ------------------------------------------------------------------------------------------------------


def folders_of(package: str) -> list[Path]:
    """Where it is installed; it is not imported."""
    specification = importlib.util.find_spec(package)
    return [Path(folder) for folder in specification.submodule_search_locations or ()] if specification else []


def cuobjdump(*arguments: str) -> Iterator[str]:
    """The lines that it prints."""
    folders = [str(folder / "backends" / "nvidia" / "bin") for folder in folders_of("triton")]
    tool = shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if tool is None:
        raise RuntimeError("there is no cuobjdump, neither in Triton's wheel nor in PATH")
    command = [tool, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield from process.stdout
        error = process.stderr.read()
    if process.returncode:
        raise RuntimeError(error.strip() or f"{command} ended with {process.returncode}")


def usages(lines: Iterable[str]) -> list[Code]:
    """Of the output of --dump-resource-usage."""
    found: list[Code] = []
    arch = symbol = ""
    for line in lines:
        if match := re.match(r"arch = (\w+)", line):
            arch, symbol = match[1], ""
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif symbol and "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            shared = usage["SHARED"]
            if shared >= RESERVED and int(re.sub(r"\D", "", arch)) >= 90:
                shared -= RESERVED  # counted in, where there is any shared memory
            code = Code(arch, symbol, usage["REG"], usage["STACK"], usage["LOCAL"], shared)
            if code not in found:  # what several source files instantiate
                found.append(code)
            symbol = ""
    return found


def disassembly(lines: Iterable[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Instructions, widths of loads and the longest loop by architecture and symbol, of the output of -sass."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    current: Counter[str] = Counter()
    arch = ""
    for line in lines:
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:.*?\b0x([0-9a-f]+))?", line):
            current[match[2]] += 1
            current[ALL] += match[2] != "NOP"
            if match[2].startswith("BRA") and match[3]:
                back = int(match[1], 16) - int(match[3], 16)
                current[LOOP] = max(current[LOOP], back // INSTRUCTION + 1 if back > 0 else 0)
        elif match := re.match(r"\s*code for (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            current = counts[arch, match[1]] = Counter()
    return {place: summary(names) for place, names in counts.items()}


def summary(names: Counter[str]) -> dict[str, Any]:
    instructions, loads = dict.fromkeys((*COUNTED, LOOP, ALL), 0), Counter()
    for name, count in names.items():
        family, *parts = name.split(".")
        if family in instructions:
            instructions[family] += count
        if family == "LDG":
            narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
            loads[next((narrow[part] for part in parts if part in narrow), 4)] += count
    return {"instructions": instructions, "loads": dict(sorted(loads.items()))}


def read(file: Path, sass: bool) -> list[Code]:
    found = usages(cuobjdump("--dump-resource-usage", str(file)))
    if not sass:
        return found
    counts = disassembly(cuobjdump("-sass", str(file)))
    return [Code(**asdict(code) | counts.get((code.arch, code.symbol), {})) for code in found]


# ---- the build -----------------------------------------------------------------------------------------------------


def built(name: str) -> Path | None:
    """An extension module of mirage_kernels for this Python, beside this script or else installed."""
    folders = [ROOT / "mirage_kernels", *folders_of("mirage_kernels")]
    files = (folder / (name + suffix) for folder in folders for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.exists()), None)


def registry() -> dict[str, tuple[int, int, int]]:
    """Threads, dynamic shared memory and the oldest GPU (80 for sm_80) by kernel. Imports the module alone: neither
    PyTorch nor a GPU is needed."""
    reasons = []
    for name in ("_cuda", "_cuda_emulated"):
        file = built(name)
        if file is None:
            reasons.append(f"mirage_kernels/{name}*.so is not there")
            continue
        specification = importlib.util.spec_from_file_location(name, file)
        try:
            module = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(module)
            return {kernel: tuple(launch) for kernel, *launch in module.kernels()}
        except (ImportError, AttributeError) as error:
            reasons.append(f"{file}: {error}")
    raise RuntimeError("no module says how kernels are launched: " + "; ".join(reasons))


def rows_of(codes: Iterable[Code], launches: dict[str, tuple[int, int, int]]) -> list[Row]:
    rows = []
    for code in codes:
        kernel = short_name(code.symbol)
        threads, shared, oldest = launches.get(kernel, (None, None, 0))
        rows.append(Row(kernel, code, threads, shared, int(gpu_of(code.arch).removeprefix("sm_")) < oldest))
    return sorted(rows, key=lambda row: (natural(row.kernel), row.code.arch))


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which 2 comes before 12."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def is_typical(row: Row) -> bool:
    """Whether a summary has it: of sm_90, float16 with weights of float16, or float32 without TF32."""
    narrow, wide = "f16" in row.kernel, "float" in row.kernel
    mixed = (narrow and wide) or ("TensorCoresTf32" in row.kernel and not narrow)  # which 16 bits have in attention
    return row.gpu == "sm_90" and "bf16" not in row.kernel and not mixed


SUMMARY = ("kernel", "registers", "dynamic shared [B]", "blocks", "occupancy", "HMMA", "LDSM", "LDGSTS", LOOP, ALL,
           "LDG by bytes")  # fmt: skip


def cells(row: Row) -> dict[str, Any]:
    """By heading."""
    code = row.code
    found = {"kernel": f"`{row.kernel}`", "arch": code.arch, "registers": code.registers, "stack [B]": code.stack,
             "local [B]": code.local, "static shared [B]": code.static_shared, "dynamic shared [B]": row.dynamic_shared,
             "threads": row.threads, "blocks": row.blocks,
             "occupancy": None if row.occupancy is None else f"{row.occupancy:g}%"}  # fmt: skip
    if code.instructions is not None:
        found |= {name: code.instructions[name] for name in (*COUNTED, LOOP, ALL)}
        found["LDG by bytes"] = " ".join(f"{width}:{count}" for width, count in (code.loads or {}).items())
    return found


def print_table(rows: list[Row], headings: Collection[str] = ()) -> None:
    """With these columns of those that there are, or all."""
    table = [cells(row) for row in rows]
    names = list(dict.fromkeys(name for line in table for name in line))
    names = [name for name in names if not headings or name in headings]
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join("---" if name in ("kernel", "arch") else "---:" for name in names) + " |")
    for line in table:
        print("| " + " | ".join("-" if line.get(name) is None else str(line[name]) for name in names) + " |")


def print_problems(rows: list[Row]) -> None:
    for row in rows:
        if row.problem:
            print(f"{row.kernel} {row.code.arch}: {row.problem}")
        elif row.too_large:
            print(f"{row.kernel} {row.code.arch}: refused by the library, for want of shared memory")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE",
                        help="extension modules or object files (default: mirage_kernels/_cuda*.so)")  # fmt: skip
    parser.add_argument("--sass", action="store_true", help="disassemble, and count instructions")
    parser.add_argument("--summary", action="store_true",
                        help="a short table: of sm_90, float16 and float32")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    files = options.files or [file for file in [built("_cuda")] if file]
    if not files:
        print("cuda_resources: no mirage_kernels/_cuda*.so was built; run make setup where nvcc is, or name a file",
              file=sys.stderr)  # fmt: skip
        return 1
    try:
        codes = [code for file in files for code in read(file, options.sass)]
    except (RuntimeError, OSError) as error:
        print(f"cuda_resources: {error}", file=sys.stderr)
        return 1
    if not codes:
        print(f"cuda_resources: no kernel in {' '.join(map(str, files))}", file=sys.stderr)
        return 1
    try:
        launches = registry()
    except RuntimeError as error:  # the rows say what this costs
        print(f"cuda_resources: {error}", file=sys.stderr)
        launches = {}
    rows = rows_of(codes, launches)
    failures = sum(bool(row.problem) for row in rows)
    if options.json:
        print(json.dumps([row.facts() for row in rows], indent=1))
    elif options.summary:
        print_table([row for row in rows if is_typical(row)], SUMMARY)
    else:
        print_table(rows)
        print()
        print_problems(rows)
        print(f"{len(rows)} kernels, {failures} with problems")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
