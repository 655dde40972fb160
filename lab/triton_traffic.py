"""Launches, bytes and memory of a pass on a GPU that is not there: mirage.fast on Triton beside eager PyTorch.

    python -m lab.triton_traffic [--variant tiny small] [--size 224x224 ...] [--batch 1] [--dtype float16] [--step]

Nothing is computed: the networks run on the meta device. A launch is a Triton kernel, or a PyTorch operation that is
no view. Its bytes are those of the tensors it is given and makes, each whole and once: about the least that it moves
(what a cache does not hold moves again). The predicted time is these bytes at --bandwidth; launches cost no time in it,
and no product does, so it is a lower bound that says what is worth measuring, not a result. Peak memory is that of the
tensors alive at one time, weights, image and gradients included; an allocator rounds up. With --step a pass is a
training step: forward, loss and backward, all in the one dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import mirage
import mirage.fast
from mirage.losses import MirageLoss
from tools.meta_device import Operators, launching

MODELS = {"tiny": mirage.mirage_tiny, "small": mirage.mirage_small}
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::detach", "aten::alias", "aten::lift_fresh")


@dataclass
class Traffic:
    """Of one pass."""

    launches: int = 0
    triton: int = 0  # of the launches
    bytes: int = 0
    peak: int = 0  # bytes

    def add(self, tensors: list[Any], triton: bool = False) -> None:
        found = {id(t): t for t in tensors if isinstance(t, Tensor)}
        self.launches += 1
        self.triton += triton
        self.bytes += sum(t.numel() * t.element_size() for t in found.values())

    def launched(self, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A kernel of ours: what `mirage_kernels._triton.launch` calls."""
        self.add(list(args), triton=True)

    def operated(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operation of PyTorch's that is no view."""
        self.add(tensors_in(args, kwargs, result))


def tensors_in(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


class Operations(Operators):
    """Counts PyTorch's own operations, and the memory that their results take while they live."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic
        self._live = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "mirage_kernels":
            return result
        tensors = tensors_in(args, kwargs or {}, result)
        for tensor in tensors:
            self._hold(tensor.untyped_storage())
        if tensors and not func.is_view and not func._schema.name.startswith(ALLOCATIONS):
            self._traffic.operated(func, args, kwargs or {}, result)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self._live += storage.nbytes()
            self._traffic.peak = max(self._traffic.peak, self._live)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self._live -= size


def measure(call: Callable[[], object], traffic: Traffic | None = None) -> Traffic:
    """What `call` does, added to `traffic`."""
    traffic = Traffic() if traffic is None else traffic
    with launching(traffic.launched), Operations(traffic):
        call()
    return traffic


def restore(model: torch.nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(x))


def train(model: torch.nn.Module, x: Tensor) -> Callable[[], object]:
    """A step without the optimizer's part."""
    criterion = MirageLoss(preset="released")
    return lambda: criterion(model(x, return_spd=True), x)[0].backward()


def row(variant: str, size: tuple[int, int], dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Both networks on one image size."""
    x = torch.empty(options.batch, 3, *size, dtype=dtype, device="meta")
    row: dict[str, Any] = {"variant": variant, "shape": list(x.shape), "dtype": str(dtype).removeprefix("torch.")}
    for name in ("eager", "fast"):
        model = MODELS[variant]().train(options.step).to("meta", dtype)
        if name == "fast":
            model = mirage.fast.accelerate(model)
        traffic = measure((train if options.step else restore)(model, x))
        row |= {f"{name}_{key}": value for key, value in asdict(traffic).items()}
        row[f"{name}_predicted_ms"] = traffic.bytes / options.bandwidth / 1e9
    return row


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    what = "Training step" if options.step else "Eval mode, no gradient"
    print(f"{what}. Bytes, at {options.bandwidth:.1f} TB/s: a prediction of nothing else.\n")
    columns = ("launches", "ours (Triton)", "MB", "ours", "ms", "ours", "fewer", "peak MiB", "ours", "less")
    print("| model | shape | dtype |", " | ".join(columns), "|")
    print("|---|---|---|" + "---:|" * len(columns))
    for r in rows:
        shape = "x".join(map(str, r["shape"]))
        print(
            f"| {r['variant']} | {shape} | {r['dtype']} | {r['eager_launches']} "
            f"| {r['fast_launches']} ({r['fast_triton']}) | {r['eager_bytes'] / 1e6:.0f} | {r['fast_bytes'] / 1e6:.0f} "
            f"| {r['eager_predicted_ms']:.2f} | {r['fast_predicted_ms']:.2f} "
            f"| {r['eager_bytes'] / r['fast_bytes']:.1f}x | {r['eager_peak'] / 2**20:.0f} "
            f"| {r['fast_peak'] / 2**20:.0f} | {r['eager_peak'] / r['fast_peak']:.1f}x |"
        )


def pair(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", nargs="+", type=pair, default=[(224, 224), (512, 512), (1080, 1920)],
                        metavar="HxW", help="height and width (default: 224x224 512x512 1080x1920)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes[:2])
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s (default: 4.3, an H200's copy)")
    parser.add_argument("--step", action="store_true", help="a training step instead of inference")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    rows = [
        row(variant, size, getattr(torch, dtype), options)
        for variant in options.variant
        for size in options.size
        for dtype in options.dtype
    ]
    print(json.dumps(rows, indent=1)) if options.json else print_table(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
