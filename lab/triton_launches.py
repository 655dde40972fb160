"""What each Triton kernel of a block has to move and to multiply, on a GPU that is not there.

    python -m lab.triton_launches [--variant tiny] [--size 224x224] [--batch 1] [--dtype float16] [--step]
                                    [--level level1 ...] [--tf32] [--json]

For one block of each level, a row for each kernel with all its launches, in the order of the first ones. Bytes are
those of `triton_traffic.py`. Products are those that `tl.dot` executes, with all that blocks of channels and pixels are
padded by and all that is computed twice. They are counted from the kernels' own code: each is interpreted, in the sizes
of the real launch, on memory that reads as zero. The iterations of a loop multiply alike: the first runs, and counts
for all. So do the programs, if the first two, the middle one and the last agree; otherwise all of them run. PyTorch's
operations are one row, their products by `torch.utils.flop_counter`.

The time is the longer one of bytes at --bandwidth and products at the peak of their kind (an H200's, or --rate).
Launches, latency and arithmetic other than products take no time in it, and no cache saves any between launches: a
bound to measure against, not a result. A block's floor are the maps of C channels that its stages cannot keep to
themselves: x and y, read and written once; in a step also x and the gradient of y, read once, and that of x, written.
All blocks are not all of the network: the convolutions between levels are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read where Triton's kernels are defined

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, _get_np_dtype  # noqa: E402

from lab.triton_traffic import MODELS, Traffic, measure, mirage, pair, tensors_in  # noqa: E402
from mirage_kernels._triton import tiles as triton_tiles  # noqa: E402
from mirage_kernels._triton.launch import is_exact  # noqa: E402

FILL = 256  # of mirage_kernels._triton.tiles where nothing is interpreted
RATES = {"16 bit": 989.0, "tf32": 494.0, "float32": 67.0}  # TFLOP/s of an H200, without sparsity
SCALES = {"encoder_level1": 1, "encoder_level2": 2, "encoder_level3": 4, "latent": 8, "decoder_level3": 4,
          "decoder_level2": 2, "decoder_level1": 1, "refinement": 1}  # fmt: skip
LEVELS = ("level1", "level2", "level3", "latent", "decoder1")
MAPS = {False: 4, True: 10}  # that a pass and a step cannot do without: the floor above


@dataclass
class Kernel:
    """All launches of one kernel in a block."""

    operator: str
    kernel: str
    launches: int = 0
    programs: int = 0
    bytes: int = 0
    products: Counter[str] = field(default_factory=Counter)  # FLOP by what RATES names

    def row(self, options: argparse.Namespace) -> dict[str, Any]:
        """Times in microseconds."""
        of_bytes = self.bytes / options.bandwidth / 1e6
        of_products = sum(n / (options.rate or RATES[kind]) / 1e6 for kind, n in self.products.items())
        return {"operator": self.operator, "kernel": self.kernel, "launches": self.launches, "programs": self.programs,
                "bytes": self.bytes, "flop": sum(self.products.values()), "us_bytes": of_bytes,
                "us_products": of_products, "us": max(of_bytes, of_products),
                "bound": "bytes" if of_bytes >= of_products else "products"}  # fmt: skip


class Launches(Traffic):
    """Traffic kernel by kernel, with its products."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[tuple[str, str], Kernel] = {}

    def launched(self, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        before = self.bytes
        super().launched(kernel, programs, args, options)
        operator = kernel.fn.__module__.split(".")[1]
        self._keep(operator, kernel.__name__, programs, self.bytes - before, products(kernel, programs, args, options))

    def operated(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        before = self.bytes
        super().operated(func, args, kwargs, result)
        with FlopCounterMode(display=False) as counter:
            func(*args, **kwargs)
        dtype = tensors_in(args, kwargs, result)[0].dtype
        kind = "16 bit" if dtype.itemsize == 2 else "float32" if is_exact(dtype) else "tf32"
        found = Counter({kind: counter.get_total_flops()})
        self._keep("PyTorch", "its operations", 0, self.bytes - before, found)

    def _keep(self, operator: str, name: str, programs: int, size: int, found: Counter[str]) -> None:
        kernel = self.kernels.setdefault((operator, name), Kernel(operator, name))
        kernel.launches += 1
        kernel.programs += programs
        kernel.bytes += size
        kernel.products.update(found)


class Interpreter:
    """Stands in for the memory, the products, the program and the loops of what Triton interprets."""

    def __init__(self) -> None:
        self.program = 0
        self.found: Counter[str] = Counter()
        self._weight = 1  # iterations that the one which runs stands for

    def dot(self, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        kind = "16 bit" if a.data.itemsize == 2 else "tf32" if precision.name == "TF32" else "float32"
        self.found[kind] += self._weight * 2 * d.data.size * a.data.shape[-1]
        return TensorHandle(np.zeros_like(d.data), d.dtype.scalar)

    def range(self, *bounds: Any) -> Iterator[int]:
        iterations = range(*bounds)
        if iterations:
            self._weight *= len(iterations)
            yield iterations[0]
            self._weight //= len(iterations)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        def load(builder: Any, pointers: Any, *rest: Any) -> Any:
            dtype = pointers.get_element_ty()
            return TensorHandle(np.zeros(pointers.data.shape, _get_np_dtype(dtype)), dtype)

        def dot(builder: Any, *args: Any) -> Any:
            return self.dot(*args)

        def program_id(builder: Any, axis: int) -> Any:
            return TensorHandle(np.array([self.program if axis == 0 else 0], np.int32), tl.int32)

        builder = {"create_load": load, "create_masked_load": load, "create_store": nothing,
                   "create_masked_store": nothing, "create_dot": dot, "create_get_program_id": program_id}  # fmt: skip
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(InterpreterBuilder, **builder))
            stack.enter_context(mock.patch.object(GridExecutor, "_init_args_hst", lambda executor, *args: args))
            stack.enter_context(mock.patch.object(GridExecutor, "_restore_args_dev", nothing))
            for name, module in list(sys.modules.items()):
                if name.startswith("mirage_kernels.") and "triton" in name:
                    stack.enter_context(mock.patch.object(module, "range", self.range, create=True))
            stack.enter_context(np.errstate(all="ignore"))
            yield


def nothing(*args: Any) -> None:
    pass


def products(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> Counter[str]:
    """FLOP of a launch, by kind."""
    interpreter = Interpreter()

    def of(program: int) -> Counter[str]:
        interpreter.program, interpreter.found = program, Counter()
        kernel[(1,)](*args, **options)
        return interpreter.found

    with interpreter.installed():
        some = [of(i) for i in {0, 1, programs // 2, programs - 1} if 0 <= i < programs]
        if all(found == some[0] for found in some):
            return Counter({kind: n * programs for found in some[:1] for kind, n in found.items()})
        return sum((of(i) for i in range(programs)), Counter())


@dataclass
class Level:
    """Blocks that are alike: those of encoder and decoder, of the decoder's level 1 and the refinement."""

    block: torch.nn.Module  # one of them
    channels: int
    scale: int  # pixels of the image to one of the level's, along a side
    count: int = 0


def levels_of(variant: str) -> dict[str, Level]:
    """By the names of LEVELS."""
    model, found = MODELS[variant](), {}
    for name, scale in SCALES.items():
        blocks = getattr(model, name)
        channels = blocks[0].norm1.body.weight.numel()
        found.setdefault((channels, scale), Level(blocks[0], channels, scale)).count += len(blocks)
    return dict(zip(LEVELS, found.values(), strict=True))


def launches_of(block: torch.nn.Module, x: torch.Tensor, step: bool) -> Launches:
    """Of one pass or step of `block`, a `mirage.blocks.TransformerBlock`, at x, which is of the meta device."""
    model = mirage.fast.accelerate(torch.nn.Sequential(block).train(step).to("meta", x.dtype))
    launches, x = Launches(), x.detach().requires_grad_(step)

    def call() -> None:
        with torch.set_grad_enabled(step):
            y = model(x)
        if step:
            torch.autograd.grad(y, [x, *model.parameters()], torch.empty_like(y))

    with mock.patch.object(triton_tiles, "FILL", FILL):
        measure(call, launches)
    return launches


def total(rows: list[dict[str, Any]], factors: list[int]) -> dict[str, Any]:
    keys = ("launches", "programs", "bytes", "flop", "us_bytes", "us_products", "us")
    return {key: sum(row[key] * n for row, n in zip(rows, factors, strict=True)) for key in keys}


def tables(options: argparse.Namespace) -> dict[str, Any]:
    levels = []
    for name, level in levels_of(options.variant).items():
        if name not in options.level:
            continue
        shape = [options.batch, level.channels, *(n // level.scale for n in options.size)]
        x = torch.empty(shape, dtype=getattr(torch, options.dtype), device="meta")
        rows = [kernel.row(options) for kernel in launches_of(level.block, x, options.step).kernels.values()]
        block = total(rows, [1] * len(rows)) | {"floor_bytes": MAPS[options.step] * x.numel() * x.element_size()}
        levels.append({"level": name, "shape": shape, "blocks": level.count, "kernels": rows, "block": block})
    network = total([level["block"] for level in levels], [level["blocks"] for level in levels])
    network["floor_bytes"] = sum(level["block"]["floor_bytes"] * level["blocks"] for level in levels)
    return {"levels": levels, "network": network}


def print_tables(found: dict[str, Any], options: argparse.Namespace) -> None:
    rate = f"{options.rate:g}" if options.rate else ", ".join(f"{kind} {n:g}" for kind, n in RATES.items())
    print(f"{'A training step' if options.step else 'Eval mode, no gradient'}: MIRAGE, {options.variant}, "
          f"{options.batch}x3x{options.size[0]}x{options.size[1]}, {options.dtype}. Predicted from bytes at "
          f"{options.bandwidth:.1f} TB/s and products at the peak (TFLOP/s: {rate}), nothing else.\n")  # fmt: skip
    columns = ("launches", "programs", "MB", "GFLOP", "us by bytes", "us by products", "us", "bound")
    print("| level | kernel |", " | ".join(columns), "|")
    print("|---|---|" + "---:|" * (len(columns) - 1) + "---|")
    for level in found["levels"]:
        for row in level["kernels"]:
            print_row(level["level"], f"{row['operator']}: {row['kernel']}", row, row["bound"])
        name = f"**a block** of {'x'.join(map(str, level['shape']))}, one of {level['blocks']}"
        print_row(level["level"], name, level["block"], floor(level["block"], options))
    if len(found["levels"]) == len(LEVELS):
        print_row("all", "**all blocks**", found["network"], floor(found["network"], options))


def floor(row: dict[str, Any], options: argparse.Namespace) -> str:
    return f"floor {row['floor_bytes'] / 1e6:.1f} MB, {row['floor_bytes'] / options.bandwidth / 1e6:.1f} us"


def print_row(level: str, name: str, row: dict[str, Any], last: str) -> None:
    counts = f"{row['launches']} | {row['programs']} | {row['bytes'] / 1e6:.1f} | {row['flop'] / 1e9:.2f}"
    times = " | ".join(f"{row[key]:.1f}" for key in ("us_bytes", "us_products", "us"))
    print(f"| {level} | {name} | {counts} | {times} | {last} |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=MODELS, default="tiny")
    parser.add_argument("--size", type=pair, default=(224, 224), metavar="HxW", help="default: 224x224")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--step", action="store_true", help="a training step instead of inference")
    parser.add_argument("--tf32", action="store_true", help="products of float32 on tensor cores")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s (default: 4.3, an H200's copy)")
    parser.add_argument("--rate", type=float, help="TFLOP/s of all products (default: an H200's for each kind)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    if any(n <= 0 or n % max(SCALES.values()) for n in options.size):
        parser.error("--size: expected positive multiples of 8")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    try:
        found = tables(options)
    finally:
        torch.set_float32_matmul_precision(before)
    print(json.dumps(found, indent=1)) if options.json else print_tables(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
