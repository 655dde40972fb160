"""Which stages a tool tells of, said on its command line, and their passes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import torch  # noqa: E402
from stages import HALVES, Function, Half, Kind, block_kinds, make_half  # noqa: E402
from triton_traffic import pair  # noqa: E402

__all__ = ["CLOCK", "ISSUED", "MULTIPROCESSORS", "Half", "Kind", "make_half", "measured", "parser_of", "precision",
           "stages", "words"]  # fmt: skip

MULTIPROCESSORS, CLOCK = 132, 1.755e9  # Hz; of an H200
ISSUED = 4  # instructions a cycle of a multiprocessor, each of a warp
Stage = tuple[str, Kind, torch.dtype]  # its half, and of what block


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backward", action="store_true", help="the backward pass, not inference")
    parser.add_argument("--half", nargs="+", choices=HALVES, default=HALVES, help="of a block (default: both)")
    parser.add_argument("--variant", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--size", nargs="+", type=pair, default=[(224, 224), (512, 512), (1080, 1920)],
                        metavar="HxW", help="height and width (default: 224x224 512x512 1080x1920)")  # fmt: skip
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=("bfloat16", "float32"))
    parser.add_argument("--tf32", action="store_true", help="products of float32 on tensor cores")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def words(options: argparse.Namespace) -> list[str]:
    """What a command line says to choose the same stages."""
    flags = [f"--{name}" for name in ("backward", "tf32") if getattr(options, name)]
    sizes = (f"{height}x{width}" for height, width in options.size)
    return [*flags, "--variant", options.variant, "--half", *options.half, "--size", *sizes, "--dtype", *options.dtype]


def stages(options: argparse.Namespace) -> Iterator[Stage]:
    for size in options.size:
        for kind in block_kinds(options.variant, *size):
            for dtype in options.dtype:
                for name in options.half:
                    yield name, kind, getattr(torch, dtype)


@contextlib.contextmanager
def precision(options: argparse.Namespace) -> Iterator[None]:
    """Of products of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measured(half: Half, function: Function, x: torch.Tensor, backward: bool) -> Callable[[], object]:
    """Forward without gradients, or backward alone: forward has run."""
    if not backward:
        return torch.no_grad()(lambda: function(x))
    x = x.detach().requires_grad_()
    y = function(x)
    return lambda: torch.autograd.grad(y, [x, *half.parameters], torch.empty_like(y))
