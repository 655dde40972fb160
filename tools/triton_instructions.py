"""What each Triton kernel of a stage issues on an H200 that is not there: its instructions, compiled for sm_90.

    python tools/triton_instructions.py [--backward] [--half mixer ffn] [--variant tiny] [--size 224x224 ...]
                                        [--dtype bfloat16 ...] [--tf32] [--json]

One image, inference or (--backward) the backward pass alone, in training; a row for each kernel with all its launches.
The instructions are those of a thread's way through the kernel with each loop counted once, so that it takes longer.
The time is that of all warps at four instructions a cycle for each multiprocessor: a bound, in which bytes, products,
latency and PyTorch's own operations take no time. `cuda_resources.py --sass` counts those of the kernels in CUDA C++.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compile_triton  # noqa: E402, I001  # before Triton is imported: it turns the interpreter off
import cuda_resources  # noqa: E402
import torch  # noqa: E402
from stage_runs import (  # noqa: E402
    CLOCK,
    ISSUED,
    MULTIPROCESSORS,
    Kind,
    make_half,
    measured,
    parser_of,
    precision,
    stages,
)
from triton_traffic import Traffic, measure, on_meta  # noqa: E402

TARGET = "sm_90"


@dataclass
class Kernel:
    """All launches of a binary in a pass."""

    kernel: str
    warps: int  # of a program
    registers: int  # of a thread
    spills: int  # bytes of a thread
    instructions: int  # of a warp
    tensor_cores: int  # of the instructions
    launches: int = 0
    programs: int = 0


class Instructions(Traffic):
    """Compiles what a pass launches."""

    binaries: dict[str, dict[str, Any]] = {}  # the facts of those that were disassembled, by hash

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Kernel] = {}  # by hash
        self._driver = compile_triton.AbsentDriver(TARGET)

    def launched(self, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().launched(kernel, programs, args, options)
        binary = self._driver.compile(kernel, programs, args, options)
        if binary.hash not in self.binaries:
            self.binaries[binary.hash] = facts(binary)
        found = self.binaries[binary.hash]
        own = self.kernels.setdefault(binary.hash, Kernel(kernel.__name__, binary.metadata.num_warps, **found))
        own.launches += 1
        own.programs += programs


def facts(binary: Any) -> dict[str, Any]:
    text = compile_triton.run_on_binary(binary, "cuobjdump", "-sass")
    (code,) = cuda_resources.disassembly(text.splitlines()).values()
    counts = code["instructions"]
    found = {"instructions": counts[cuda_resources.ALL], "tensor_cores": counts["HMMA"] + counts["HGMMA"]}
    return found | compile_triton.resources(binary)


def kernels_of(name: str, kind: Kind, dtype: torch.dtype, backward: bool) -> list[Kernel]:
    """Those of a pass."""
    channels, _, height, width = kind
    half = make_half(name, kind, training=backward, device="meta", dtype=dtype)
    x = torch.empty(1, channels, height, width, dtype=dtype, device="meta")
    found = Instructions()
    with on_meta(Traffic()):
        run = measured(half, half.fast, x, backward)
    measure(run, found)
    return list(found.kernels.values())


def microseconds(kernel: Kernel) -> float:
    return kernel.programs * kernel.warps * kernel.instructions / (MULTIPROCESSORS * ISSUED * CLOCK) * 1e6


def row(name: str, kind: Kind, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    kernels = [asdict(kernel) | {"us": microseconds(kernel)} for kernel in kernels_of(name, kind, dtype, backward)]
    shape = [1, kind[0], *kind[2:]]
    facts = {"stage": name, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "kernels": kernels}
    return facts | {"us": sum(kernel["us"] for kernel in kernels)}


def print_table(found: list[dict[str, Any]]) -> None:
    names = ("launches", "programs", "warps", "registers", "spills", "instructions", "tensor_cores", "us")
    print("| stage | dtype | kernel |", " | ".join(name.replace("_", " ") for name in names), "|")
    print("|---|---|---|" + "---:|" * len(names))
    for of_stage in found:
        place = f"| {of_stage['stage']} {'x'.join(map(str, of_stage['shape'][1:]))} | {of_stage['dtype']} |"
        for kernel in of_stage["kernels"]:
            counts = " | ".join(str(kernel[name]) for name in names[:-1])
            print(place, f"{kernel['kernel']} | {counts} | {kernel['us']:.1f} |")
        print(place, f"**all** |{' |' * (len(names) - 1)} {of_stage['us']:.1f} |")


def main(argv: list[str] | None = None) -> int:
    options = parser_of(__doc__.splitlines()[0]).parse_args(argv)
    with precision(options):
        found = [row(*stage, options.backward) for stage in stages(options)]
    print(json.dumps(found, indent=1)) if options.json else print_table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
