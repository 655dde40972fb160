"""How fast it is, and in how much memory: networks, training steps and stages, on a GPU that does nothing else.

How a time is taken: `benchmarks.gpu`. Stages are timed as replays of a CUDA graph: by themselves, without the launches
from Python that a whole network as a graph does not have either."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import mirage_kernels
from benchmarks import gpu
from benchmarks.machine import copy_bandwidth, matrix_rate
from benchmarks.stages import make_half
from mirage import complexity, table6
from mirage.doctor import package_version
from mirage_kernels._runtime.dispatch import triton_version
from tools.first_light import truth
from tools.first_light.pool import Row

STAGES = ("mixer_stage", "feed_forward_stage", "transformer_blocks")
ROUNDS = {"cuda": (5, 50), "cpu": (2, 2)}
"""The least and the most samples of a time; on a CPU nobody wants to know it."""


def machine(device: str) -> Iterator[Row]:
    """What it is that is measured."""
    facts: Row = {
        "device": platform.processor() or platform.machine(),
        "version": package_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "implementations": mirage_kernels.available(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory >> 20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    facts["nvcc"] = said_by("nvcc", "--version").rpartition("release ")[2].partition(",")[0]
    yield {"facts": facts}


def said_by(*command: str) -> str:
    """What a program prints, or nothing where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def rates(device: str) -> Iterator[Row]:
    """Bytes and multiply-adds a second that the machine reaches."""
    yield {"copy_bytes_per_s": copy_bandwidth(device), "macs_per_s": matrix_rate(device)}


def timed(call: Callable[[], object], device: str, seconds: float) -> Row:
    """Median and quartiles of the seconds of a call."""
    found = gpu.samples(call, device, seconds, ROUNDS[device])
    q1, median, q3 = statistics.quantiles(found, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(found)}


@lru_cache(maxsize=1)
def truth_of(problem: gpu.Problem) -> Tensor:
    return gpu.truth(problem)


def inference(
    variant: str, shape: list[int], dtype: str, peer: str, device: str, seconds: float, tf32: bool = False
) -> Iterator[Row]:
    """A network restoring an image: time, peak memory, distance from eager in float32, and what its blocks ran on."""
    if peer.endswith("cuda") and (absent := truth.missing("cuda")):
        yield absent
        return
    problem = gpu.Problem(variant, tuple(shape), getattr(torch, dtype), device, tf32)
    named = {"test": "test_inference", "group": f"inference {problem}"}
    if device == "cpu":
        peer = {"graph": "fast", "graph-cuda": "cuda"}.get(peer, peer)
    with gpu.precision(tf32):
        expected = truth_of(gpu.Problem(variant, tuple(shape), torch.float32, device))
        call = gpu.inference(problem, peer)
        error = gpu.relative_error(call(), expected)
        ran = sorted({name for stage in STAGES if (name := mirage_kernels.last_used(stage))})
        row = {
            **named,
            "error": error,
            "ran": ran,
            "peak_mib": gpu.peak_mib(call, device),
            **timed(call, device, seconds),
        }
    limit = gpu.FARTHEST[torch.float16 if tf32 else problem.dtype]
    if not error <= limit:
        row |= {"status": "wrong", "problem": f"{error:.1e} from eager in float32, {limit:.1e} are allowed"}
    yield row


def ahead(variant: str, shape: list[int], dtype: str, peer: str, device: str) -> Iterator[Row]:
    """Compile a network beside other work: what is timed later finds it in the caches."""
    with gpu.precision(tf32=False):
        gpu.inference(gpu.Problem(variant, tuple(shape), getattr(torch, dtype), device), peer)()
    yield {}


def step(variant: str, shape: list[int], dtype: str, peer: str, device: str, seconds: float) -> Iterator[Row]:
    """A training step under autocast: time, peak memory, loss."""
    if peer.endswith("cuda") and (absent := truth.missing("cuda")):
        yield absent
        return
    problem = gpu.Problem(variant, tuple(shape), getattr(torch, dtype), device)
    if device == "cpu":
        peer = {"graph-low": "fast-low"}.get(peer, peer)
    with gpu.precision(tf32=False):
        call = gpu.step(problem, peer)
        torch.manual_seed(0)  # of the stochastic depth
        loss = float(call())
        row = {"test": "test_step", "group": f"step {problem}", "loss": loss, "peak_mib": gpu.peak_mib(call, device)}
        row |= timed(call, device, seconds)
    if not loss == loss or abs(loss) == float("inf"):
        row |= {"status": "wrong", "problem": f"its loss is {loss}"}
    yield row


def memory(variant: str, implementation: str, size: int, device: str) -> Iterator[Row]:
    """The memory column of the paper's Table 6: the peak of a training-mode forward pass, parameters included."""
    model = table6.build(variant, implementation, seed=0).to(device)
    cost = complexity.measure(model, x=torch.rand(1, 3, size, size, device=device))
    yield {"memory_mib": cost.peak_memory_mib, "method": cost.memory_method, "gmacs": cost.gmacs}


def warm(
    half: str, level: list[int], batch: int, dtype: str, training: bool, device: str, variant: str = ""
) -> Iterator[Row]:
    """Half a block at one size once, so that Triton compiles its kernels now, beside others, and not when a network is
    to be timed. In training under autocast, forward and backward."""
    found = make_half(half, tuple(level), training, device, torch.float32 if training else getattr(torch, dtype))
    dim, _, height, width = level
    x = torch.randn(batch, dim, height, width, device=device).to(getattr(torch, dtype))
    if not training:
        with torch.inference_mode():
            finite = bool(found.fast(x).isfinite().all())
    else:
        x.requires_grad_()
        with torch.autocast(device, getattr(torch, dtype)):
            y = found.fast(x)
        gradients = torch.autograd.grad(y, (x, *found.parameters), torch.randn_like(y))
        finite = all(bool(t.isfinite().all()) for t in (y, *gradients))
    yield {} if finite else {"status": "wrong", "problem": "a result is not finite"}


def stage(
    half: str, level: list[int], batch: int, dtype: str, both: bool, implementation: str, device: str, seconds: float
) -> Iterator[Row]:
    """Half a block, forward or forward and backward, with the least bytes that it has to move."""
    if implementation != "eager" and (absent := truth.missing(implementation)):
        yield absent
        return
    found = make_half(half, tuple(level), both, device, getattr(torch, dtype))
    dim, _, height, width = level
    x = torch.randn(batch, dim, height, width, device=device).to(getattr(torch, dtype)).requires_grad_(both)
    function = found.eager if implementation == "eager" else found.fast
    grad = torch.randn_like(x)

    def call() -> Any:
        with torch.set_grad_enabled(both):
            y = function(x)
            return torch.autograd.grad(y, (x, *found.parameters), grad) if both else y

    unit = x.element_size() * dim * height * width * (5 if both else 2)
    least = (found.bytes_both if both else found.bytes_forward) + (batch - 1) * unit
    direction = "both" if both else "forward"
    row = {
        "test": "test_stage",
        "group": f"{half} {batch}x{dim}x{height}x{width} {dtype} {direction}",
        "peer": {"triton": "fast"}.get(implementation, implementation),
        "bytes": least,
    }
    forced = contextlib.nullcontext() if implementation == "eager" else mirage_kernels.use(implementation)
    with forced, gpu.precision(tf32=False):
        replay, how = replayed(call, device)
        row |= {"how": how, **timed(replay, device, seconds)}
    if implementation != "eager":
        name = {"mixer": "mixer_stage", "ffn": "feed_forward_stage"}[half]
        for called in (name, f"{name}_backward") if both else (name,):
            if reason := mirage_kernels.why_not(called).get(implementation):
                row["declined"] = {**row.get("declined", {}), called: reason}
    yield row


def replayed(call: Callable[[], Any], device: str) -> tuple[Callable[[], Any], str]:
    """The call as a CUDA graph, or itself where it cannot be one; and which of the two, with the reason."""
    if device != "cuda":
        return call, "called: there is no GPU"
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return call, f"called: no graph of it, {str(error)[:200]}"

    def replay() -> Any:
        graph.replay()
        return kept

    return replay, "graph"


KINDS = {
    "machine": machine,
    "rates": rates,
    "inference": inference,
    "ahead": ahead,
    "step": step,
    "memory": memory,
    "warm": warm,
    "stage": stage,
}
