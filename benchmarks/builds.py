"""Two builds of the C++ library in turns: what a compiler's option or a change of the kernels costs or gains.

    python -m benchmarks.builds before/_native.cpython-311-x86_64-linux-gnu.so mirage_kernels/_native*.so

Every operator and both stages, forward and backward, at the shapes of MIRAGE-T for an image of 224x224. Each build is
loaded into a process of its own, with the Python code of this checkout; a turn of one follows a turn of the other, so
that what else the machine does meets both. `ratio` is the median over the rounds of the second's time by the first's,
`best` the ratio of their shortest, `same` whether the results have the same bits. MIRAGE_CPU_ISA chooses the
instruction set of both. Exit status 1 where both ratios of a case are over the limit: on a busy machine one of them
soon is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parent.parent
DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_library(path: str) -> None:
    """Makes the file the package's C++ library, before the package is imported."""
    import torch  # noqa: F401  # whose OpenMP the library shares

    name = "mirage_kernels._native"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def cases(size: int) -> dict[str, Callable[[str], Callable[[], Any]]]:
    """By name, what makes the function to time for a dtype."""
    import torch

    from benchmarks.stages import HALVES, block_kinds, make_half
    from benchmarks.workloads import operator_workloads

    found: dict[str, Callable[[str], Callable[[], Any]]] = {}

    def add(name: str, make: Callable[[Any, bool], tuple[Callable[..., Any], list[Any]]]) -> None:
        def forward(dtype: str) -> Callable[[], Any]:
            function, tensors = make(getattr(torch, dtype), False)

            def run() -> Any:
                with torch.inference_mode():
                    return function(*tensors)

            return run

        def both(dtype: str) -> Callable[[], Any]:
            function, tensors = make(getattr(torch, dtype), True)
            tensors = [t.requires_grad_() for t in tensors]
            y = function(*tensors)
            grad = torch.randn(y.shape).to(y.dtype)
            return lambda: torch.autograd.grad(function(*tensors), tensors, grad)

        found[f"{name} forward"] = forward
        found[f"{name} forward+backward"] = both

    for workload in operator_workloads(size):

        def make(dtype, both, workload=workload):
            return workload.operator.public, [t.to(dtype) for t in workload.make()]

        add(f"{workload.operator.name} {workload.name}", make)
    for kernel in (5, 7, 9, 11):  # the released network has 3; others are configurations of it

        def make(dtype, both, kernel=kernel):
            import mirage_kernels

            tensors = [torch.randn(1, 48, size // 4, size // 4), torch.randn(1, 48, kernel, kernel)]
            return mirage_kernels.dynamic_depthwise_conv2d, [t.to(dtype) for t in tensors]

        add(f"dynamic_depthwise_conv2d 1x48x{size // 4}x{size // 4} kernel {kernel}", make)
    for half in HALVES:
        for kind in block_kinds("tiny", size, size):

            def make(dtype, both, half=half, kind=kind):
                dim, _, height, width = kind
                stage = make_half(half, kind, both, "cpu", dtype)
                function = stage.fast
                x = torch.randn(1, dim, height, width).to(dtype)
                if not both:
                    return function, [x]
                return lambda x, *parameters: function(x), [x, *stage.parameters]

            add(f"half {half} {'x'.join(map(str, kind))}", make)
    return found


def serve(library: str, size: int, threads: int) -> None:
    """The worker's end: names of cases in, how long a turn of them took out, one line of JSON each."""
    sys.path.insert(0, str(ROOT))
    load_library(library)
    import torch

    import mirage_kernels

    torch.set_num_threads(threads)
    assert mirage_kernels.available()["cpp"] == "yes", mirage_kernels.available()["cpp"]
    makers, run, current = cases(size), None, None
    print(json.dumps(sorted(makers)), flush=True)
    for line in sys.stdin:
        name, dtype, seconds = json.loads(line)
        answer = {}
        if (name, dtype) != current:
            torch.manual_seed(0)
            run, current = makers[name](dtype), (name, dtype)
            result = run()
            results = [result] if isinstance(result, torch.Tensor) else [r for r in result if r is not None]
            data = b"".join(r.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for r in results)
            answer["digest"] = hashlib.sha256(data).hexdigest()
        times = []
        stop = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < stop:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        answer["seconds"] = min(times)
        print(json.dumps(answer), flush=True)


class Build:
    """A process with one of the two libraries."""

    def __init__(self, library: Path, size: int, threads: int) -> None:
        command = [sys.executable, str(SCRIPT), "--serve", str(library), "--size", str(size), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names: list[str] = self._answer()

    def turn(self, name: str, dtype: str, seconds: float) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps([name, dtype, seconds]), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"builds: a worker ended with {self._process.wait()}")
        return json.loads(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", type=Path, help="the two libraries, .so files")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--only", default="", help="regular expression of the cases to time")
    parser.add_argument("--size", type=int, default=224, help="side of the image (default: 224)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each build (default: 15)")
    parser.add_argument("--seconds", type=float, default=0.02, help="at least so long a turn (default: 0.02)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.03, help="largest ratio that passes (default: 1.03)")
    parser.add_argument("--serve", metavar="LIBRARY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.size, options.threads)
        return 0
    if len(options.libraries) != 2:
        parser.error("expected two libraries")
    first, second = (Build(library.resolve(), options.size, options.threads) for library in options.libraries)
    over = []
    print(f"{'case':78} {'first ms':>9} {'second ms':>9} {'ratio':>6} {'best':>6}  same", flush=True)
    for name in first.names:
        if not re.search(options.only, name):
            continue
        for dtype in options.dtype:
            one, two = first.turn(name, dtype, 0), second.turn(name, dtype, 0)
            same = one["digest"] == two["digest"]
            pairs = []
            for _ in range(options.rounds):
                pairs.append(tuple(build.turn(name, dtype, options.seconds)["seconds"] for build in (first, second)))
            ratio = statistics.median(b / a for a, b in pairs)
            before, after = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
            best = min(b for _, b in pairs) / min(a for a, _ in pairs)
            slower = min(ratio, best) > options.limit
            row = f"{f'{name}, {dtype}':78} {before:9.3f} {after:9.3f} {ratio:6.3f} {best:6.3f}  {same}"
            print(row + "  <<" * slower, flush=True)
            if slower:
                over.append((name, dtype, ratio))
    print(f"{len(over)} over {options.limit}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
