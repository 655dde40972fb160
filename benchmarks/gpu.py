"""What is timed on a GPU, and how: the network and its stages beside eager PyTorch and torch.compile.

A sample is the time between two CUDA events around one call, after a write over more memory than the second-level cache
holds. Each call is synchronised, so of functions that launch slowly it contains the gaps between their launches: it is
the latency that a caller sees. Peak memory is `torch.cuda.max_memory_allocated` of one call, with the weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mirage
import mirage.fast
import mirage_kernels
from mirage.losses import MirageLoss

BUILDERS = {"tiny": mirage.mirage_tiny, "small": mirage.mirage_small}
COLD_BYTES = 256 << 20
PEERS = ("eager", "compile", "fast", "graph", "cuda", "graph-cuda")
"""The last two are the stages in CUDA C++ where "fast" and "graph" run what is chosen by itself."""
MODES = {"compile": "max-autotune", "compile-default": "default"}
"""Of torch.compile."""
STEP_PEERS = ("eager", "compile", "fast-low", "graph-low", "low-cuda")
SLOW = ("compile",)  # to build
FARTHEST = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of a restored image from eager's in float32, relative (norm): a result further off is a mistake."""


@dataclass(frozen=True)
class Problem:
    """A network, the shape [B, 3, H, W] of its image, and the dtype of both (of autocast in a training step).

    `tf32`: whether products of float32 may be of TF32, PyTorch's and ours (see :func:`precision`).
    """

    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cuda"
    tf32: bool = False

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{self.variant}-{'x'.join(map(str, self.shape))}-{dtype}"

    def model(self) -> nn.Module:
        """The reference with weights that are the same every time, in float32."""
        torch.manual_seed(0)
        return BUILDERS[self.variant]().to(self.device)

    def image(self, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.shape, generator=generator).to(self.device)


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Inside, products and convolutions of float32 are of TF32, or none is: without being asked PyTorch takes it for
    convolutions alone, and our kernels for neither, which would be no comparison."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def written_in(peer: str) -> contextlib.AbstractContextManager[None]:
    """Inside, stages run in CUDA C++ for the peers that are so called."""
    return mirage_kernels.use("cuda") if peer.endswith("cuda") else contextlib.nullcontext()


def inference(problem: Problem, peer: str) -> Callable[[], Tensor]:
    """A call that restores the problem's image; to be made and called inside `precision(problem.tf32)`."""
    model, image = problem.model().eval().to(problem.dtype), problem.image().to(problem.dtype)
    if peer in MODES:
        model = torch.compile(model, mode=MODES[peer])
    elif peer != "eager":
        model = mirage.fast.accelerate(model)
    with written_in(peer):
        run = mirage.fast.cuda_graph(model, image) if peer.startswith("graph") else model

    def call() -> Tensor:
        with torch.inference_mode(), written_in(peer):
            return run(image)

    return call


def truth(problem: Problem) -> Tensor:
    """What eager restores in float32, products without TF32."""
    with torch.inference_mode(), precision(False):
        return problem.model().eval()(problem.image())


def relative_error(value: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm()).item()


class _WithEmbeddings(nn.Module):
    """A network called as in training, with one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Any:
        return self.model(image, return_spd=True)


def step(problem: Problem, peer: str) -> Callable[[], Tensor]:
    """A call that takes a training step, forward, loss and backward, under autocast to the problem's dtype."""
    model = problem.model().train()
    if peer in MODES:
        model = torch.compile(model)
    elif peer != "eager":
        model = mirage.fast.accelerate(model, memory="low")
    criterion, image, target = MirageLoss(preset="released"), problem.image(), problem.image(2)
    kind, half, graphed = torch.device(problem.device).type, problem.dtype != torch.float32, peer == "graph-low"
    # autocast's cache of rounded weights would hand a graph what belongs to another
    autocast = partial(torch.autocast, kind, problem.dtype, half, cache_enabled=not graphed)
    run: Callable[[Tensor], Any] = _WithEmbeddings(model)
    if graphed:  # forward and backward as one launch each
        with autocast():
            run = torch.cuda.make_graphed_callables(run, (image,))

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        with autocast(), written_in(peer):
            outputs = run(image)
        loss = criterion(outputs, target)[0]
        loss.backward()
        return loss.detach()

    return call


def samples(
    function: Callable[[], object], device: str, seconds: float = 0.6, rounds: tuple[int, int] = (5, 100)
) -> list[float]:
    """Seconds of each of some calls, between `rounds` of them, after three to warm up."""
    cold = torch.empty(COLD_BYTES if device == "cuda" else 1, dtype=torch.int8, device=device)
    for _ in range(3):
        function()
    once = _sample(function, cold)
    count = min(max(int(seconds / max(once, 1e-9)), rounds[0]), rounds[1])
    return [_sample(function, cold) for _ in range(count)]


def _sample(function: Callable[[], object], cold: Tensor) -> float:
    cold.zero_()
    if cold.device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_mib(function: Callable[[], object], device: str) -> float | None:
    """MiB allocated at the peak of one call; None where PyTorch does not count."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20
