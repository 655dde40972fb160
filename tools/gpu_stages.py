"""Both halves of each kind of block on a GPU that is not there: eager PyTorch, Triton and CUDA C++ beside the floor.

    python tools/gpu_stages.py [--backward] [--half mixer ffn] [--variant tiny] [--size 224x224 ...]
                               [--dtype bfloat16 ...] [--tf32] [--json]

Everything here is predicted; `python -m benchmarks.gpu_report` prints the same stages as they were measured. For an
H200, one image, inference or (--backward) the backward pass alone, in training. A time is the longer one of bytes at
--bandwidth and products at the peak of their kind:

- floor: x read, y written and the weights read, once; the reference's products (`benchmarks/stages.py`). No
  implementation can be faster. Backward: x and its own gradients too, and twice the products; none is computed again.
- eager and Triton: launch by launch, as `triton_traffic.py` and `triton_launches.py` count them.
- CUDA C++: the library's own launches, made by its host code at the real size with as many multiprocessors as the GPU
  has. Bytes: x as often as kernels read it, y, weights, and scratch memory written and read. Products: counted where
  the kernels' source executes them, emulated on small images, for each tile. `-` where no kernel has so many channels.
- issue: instructions, as nvcc and Triton compiled them for sm_90, four a cycle for each multiprocessor. Of Triton's
  kernels all, each loop counted once (`triton_instructions.py`); in CUDA C++ of the feed-forward every turn of its loop
  over hidden channels, of the mixer a tile's way through its kernels, each loop inside counted once. So most take
  longer. `-` without mirage_kernels/_cuda*.so, and for the feed-forward's backward in CUDA C++.

What no column has: launches (some 2 us each, fewer in a graph), latency, caches, and PyTorch's own instructions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"MIRAGE_CUDA_EMULATE": "1", "TRITON_INTERPRET": "1"}  # read when mirage_kernels is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cuda_resources  # noqa: E402
import torch  # noqa: E402
from stage_runs import (  # noqa: E402
    CLOCK,
    ISSUED,
    MULTIPROCESSORS,
    Half,
    Kind,
    make_half,
    measured,
    parser_of,
    precision,
    stages,
    words,
)
from triton_launches import FILL, RATES, Launches  # noqa: E402
from triton_traffic import Traffic, measure  # noqa: E402

import mirage_kernels  # noqa: E402
from mirage_kernels._runtime import cuda_runtime, dispatch  # noqa: E402
from mirage_kernels._runtime.library import is_exact  # noqa: E402
from mirage_kernels._triton import tiles as triton_tiles  # noqa: E402

WARPS = 8  # of a block
COLUMNS = 16  # of a tile
KERNEL = re.compile(r"(\w+)<(\w+(?:<\w+>)?)(?:, (\w+))?, (\d+), (\d+)>")  # product, weights, sixteens, rows of a tile
READS = {"mixer": 2, "ffn": 1}  # of x
READS_BACKWARD = {"mixer": 4 + 2, "ffn": 2 + 2}  # of x and of the gradient of y


@dataclass(frozen=True)
class Launch:
    """What the emulation has recorded of one."""

    kernel: str
    blocks: int
    threads: int
    flop: int


def kind_of(dtype: torch.dtype) -> str:
    """Of its products: a key of RATES."""
    return "16 bit" if dtype.itemsize == 2 else "float32" if is_exact(dtype) else "tf32"


def longer(size: float, flop: float, kind: str, options: argparse.Namespace) -> float:
    """us"""
    return max(size / options.bandwidth / 1e6, flop / RATES[kind] / 1e6)


# ---- CUDA C++ ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_many_multiprocessors(library: Any) -> Iterator[None]:
    library.set_multiprocessors(MULTIPROCESSORS)
    try:
        yield
    finally:
        library.set_multiprocessors(4)  # the emulation's own


def recorded(half: Half, x: torch.Tensor, execute: bool, backward: bool = False) -> tuple[list[Launch], int]:
    """The launches of a pass, and the bytes of its scratch memory; none where the library has no kernel for it."""
    library, sizes = dispatch.cuda, []
    kept = cuda_runtime.workspace

    def workspace(size: int, x: torch.Tensor) -> torch.Tensor:
        sizes.append(size)
        return kept(size, x)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cuda_runtime, "workspace", workspace))
        stack.enter_context(on_many_multiprocessors(library))
        stack.enter_context(mirage_kernels.use("cuda"))
        library.start_record(False)
        try:
            run = measured(half, half.fast, x, backward)  # with backward runs forward, whose results do not matter here
            library.stop_record()
            sizes.clear()
            library.start_record(execute)
            run()
        finally:
            launches = [Launch(*facts) for facts in library.stop_record()]
    return (launches, sizes[0]) if len(sizes) == 1 else ([], 0)  # a composite of several calls, or of none


def tiles(height: int, width: int, rows: int) -> int:
    return -(-height // rows) * -(-width // COLUMNS)


@functools.cache
def of_a_tile(name: str, channels: int, heads: int, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """FLOP on tensor cores, and the rows of the tile: executed on images of one and two."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = []
        for rows in (4, 8, 16):
            half = make_half(name, (channels, heads, rows, COLUMNS), training=backward, dtype=dtype)
            x = torch.randn(1, channels, rows, COLUMNS).to(dtype)
            found.append(sum(launch.flop for launch in recorded(half, x, True, backward)[0]))
    finally:
        torch.set_float32_matmul_precision(before)
    four, eight, sixteen = found
    rows = 8 if four == eight else 4
    if sixteen != eight * 2 or eight != four * 8 // rows:
        raise RuntimeError(f"the products of {name} with {channels} channels are not those of its tiles: {found}")
    return four, rows


def products(name: str, kind: Kind, dtype: torch.dtype, backward: bool = False) -> int:
    """FLOP on tensor cores of one image. float32 without TF32 has as many, as multiply-adds that are not counted."""
    channels, heads, height, width = kind
    flop, rows = of_a_tile(name, channels, heads, dtype, backward)
    return flop * tiles(height, width, rows)


def compiled(name: str, channels: int, dtype: torch.dtype, rows: list[cuda_resources.Row]) -> Any:
    """Rows of a tile and instructions of the kernel `name` for so many channels; None where there is none."""
    element = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "float"}[dtype]
    wanted = {"16 bit": f"TensorCores16<{element}>", "tf32": "TensorCoresTf32", "float32": "ExactFloat"}[kind_of(dtype)]
    fitting = []
    for row in rows:
        found = KERNEL.fullmatch(row.kernel)
        if not found or row.gpu != "sm_90" or found[1] != name or found[2] != wanted or found[3] not in (None, element):
            continue
        if 16 * int(found[4]) >= channels:
            fitting.append((int(found[4]), -int(found[5]), row.code.instructions))
    if not fitting:
        return None
    _, tile_rows, instructions = min(fitting, key=lambda entry: entry[:2])
    return -tile_rows, instructions


def issue_microseconds(
    name: str, kind: Kind, dtype: torch.dtype, rows: list[cuda_resources.Row], backward: bool = False
) -> float | None:
    """Of the kernels that have most of a stage's instructions."""
    channels, _, height, width = kind
    every, loop = cuda_resources.ALL, cuda_resources.LOOP
    if name == "ffn":
        chunks = -(-2 * channels // 16)  # of 16 pairs each, of twice as many as channels
        kernels = {} if backward else {"feed_forward_kernel": (channels, loop, chunks)}
    elif backward:
        parts = ("fusion", "gate", "detail", "query")
        kernels = {f"mixer_{part}_backward_kernel": (channels // 3, loop, 1) for part in parts}
    else:
        kernels = {"mixer_reduce_kernel": (channels // 3, loop, 1), "mixer_fuse_kernel": (channels // 3, every, 1)}
    issued = 0
    for kernel, (width_of, which, turns) in kernels.items():
        found = compiled(kernel, width_of, dtype, rows)
        if found is None:
            return None
        tile_rows, instructions = found
        issued += tiles(height, width, tile_rows) * turns * instructions[which] * WARPS
    return issued / (MULTIPROCESSORS * ISSUED * CLOCK) * 1e6 if kernels else None


# ---- the table -----------------------------------------------------------------------------------------------------


def triton_pass(half: Half, x: torch.Tensor, both: bool, options: argparse.Namespace) -> tuple[int, int, float]:
    """Launches, bytes and us of forward, or of forward and backward: which implementation runs, forward decides."""
    launches, rated = Launches(), argparse.Namespace(bandwidth=options.bandwidth, rate=None)
    x = x.detach().requires_grad_(options.backward)
    with mock.patch.object(triton_tiles, "FILL", FILL):
        if both:
            measure(lambda: measured(half, half.fast, x, True)(), launches)
        else:
            measure(torch.set_grad_enabled(options.backward)(lambda: half.fast(x)), launches)
    us = sum(kernel.row(rated)["us"] for kernel in launches.kernels.values())
    return launches.launches, launches.bytes, us


def triton(half: Half, x: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    found = triton_pass(half, x, False, options)
    if options.backward:
        both = triton_pass(half, x, True, options)
        found = tuple(whole - forward for whole, forward in zip(both, found, strict=True))
    return dict(zip(("triton_launches", "triton_bytes", "triton_us"), found, strict=True))


def eager(half: Half, x: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Its products are those of the floor, and not added: most launches have none."""
    traffic = measure(measured(half, half.eager, x, options.backward), Traffic())
    us = traffic.bytes / options.bandwidth / 1e6
    return {"eager_launches": traffic.launches, "eager_bytes": traffic.bytes, "eager_us": us}


def cuda(name: str, kind: Kind, dtype: torch.dtype, options: argparse.Namespace, rows: Any) -> dict[str, Any]:
    channels, _, height, width = kind
    half = make_half(name, (*kind[:2], 8, COLUMNS), training=options.backward, dtype=dtype)  # for images of all sizes
    x = torch.empty(1, channels, height, width, dtype=dtype)
    launches, workspace = recorded(half, x, False, options.backward)
    if not launches:
        return dict.fromkeys(("cuda_launches", "cuda_bytes", "cuda_flop", "cuda_issue_us", "cuda_us"))
    sums = any(launch.kernel == "feed_forward_sum_kernel" for launch in launches)  # which adds x
    reads = READS_BACKWARD[name] if options.backward else READS[name] + sums
    size = (reads + 1) * x.nbytes + sum(t.nbytes for t in half.parameters) + 2 * workspace
    if options.backward:  # float
        size += sum(4 * t.numel() for t in half.parameters)
    flop = products(name, kind, dtype, options.backward)
    issue = issue_microseconds(name, kind, dtype, rows, options.backward)
    us = max(longer(size, flop, kind_of(dtype), options), issue or 0.0)
    found = {"cuda_launches": len(launches), "cuda_bytes": size, "cuda_flop": flop}
    return found | {"cuda_issue_us": issue, "cuda_us": us}


def row(name: str, kind: Kind, dtype: torch.dtype, options: argparse.Namespace, rows: Any) -> dict[str, Any]:
    channels, _, height, width = kind
    half = make_half(name, kind, training=options.backward, device="meta", dtype=dtype)
    x = torch.empty(1, channels, height, width, dtype=dtype, device="meta")
    flop, size = 2 * half.macs_forward, half.bytes_forward
    if options.backward:
        flop, size = 2 * flop, half.bytes_both - half.bytes_forward
    floor = {"floor_bytes": size, "floor_flop": flop, "floor_us": longer(size, flop, kind_of(dtype), options)}
    facts = {"stage": name, "shape": list(x.shape), "dtype": str(dtype).removeprefix("torch.")} | floor
    return facts | eager(half, x, options) | triton(half, x, options) | cuda(name, kind, dtype, options, rows)


def triton_issued(options: argparse.Namespace) -> list[float]:
    """us of each stage by its instructions. In a process of its own: here Triton's kernels are interpreted."""
    tool = Path(__file__).with_name("triton_instructions.py")
    done = subprocess.run([sys.executable, tool, *words(options), "--json"], check=True, stdout=subprocess.PIPE)
    return [of_stage["us"] for of_stage in json.loads(done.stdout)]


def resources() -> list[cuda_resources.Row]:
    """What nvcc has made of the kernels; none where it was not there."""
    file = cuda_resources.built("_cuda")
    return cuda_resources.rows_of(cuda_resources.read(file, sass=True), {}) if file else []


def print_table(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    rates = ", ".join(f"{kind} {n:g}" for kind, n in RATES.items())
    what = "backward" if options.backward else "inference"
    print(f"Predicted, {what}, MIRAGE {options.variant}: bytes at {options.bandwidth:.1f} TB/s, products at the "
          f"peak (TFLOP/s: {rates}). MB and us; in brackets launches.\n")  # fmt: skip
    names = ("floor MB", "us", "eager MB", "us", "Triton MB", "issue us", "us", "CUDA MB", "GFLOP", "issue us", "us")
    print("| stage | dtype |", " | ".join(names), "|")
    print("|---|---|" + "---:|" * len(names))
    for r in found:
        cells = [f"{r['floor_bytes'] / 1e6:.1f}", f"{r['floor_us']:.1f}"]
        cells += [f"{r['eager_bytes'] / 1e6:.1f} ({r['eager_launches']})", f"{r['eager_us']:.1f}"]
        cells += [f"{r['triton_bytes'] / 1e6:.1f} ({r['triton_launches']})", f"{r['triton_issue_us']:.1f}"]
        cells += [f"{r['triton_us']:.1f}"]
        issue = "-" if r["cuda_issue_us"] is None else f"{r['cuda_issue_us']:.1f}"
        if r["cuda_launches"] is None:
            cells += ["-"] * 4
        else:
            cells += [f"{r['cuda_bytes'] / 1e6:.1f} ({r['cuda_launches']})", f"{r['cuda_flop'] / 1e9:.2f}", issue,
                      f"{r['cuda_us']:.1f}"]  # fmt: skip
        print(f"| {r['stage']} {'x'.join(map(str, r['shape'][1:]))} | {r['dtype']} |", " | ".join(cells), "|")


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s (default: 4.3, an H200's copy)")
    options = parser.parse_args(argv)
    if mirage_kernels.available()["cuda"] != "yes":
        print(f"gpu_stages: {mirage_kernels.available()['cuda']}", file=sys.stderr)
        return 1
    kept = resources()
    with precision(options):
        found = [row(*stage, options, kept) for stage in stages(options)]
    for of_stage, issue in zip(found, triton_issued(options), strict=True):
        of_stage |= {"triton_issue_us": issue, "triton_us": max(of_stage["triton_us"], issue)}
    print(json.dumps(found, indent=1)) if options.json else print_table(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
