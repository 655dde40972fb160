"""Measure warps and pipeline stages of every Triton launch on this machine's GPU: ``mirage tune``.

A network runs; each launch of a kind that has not been seen is timed with every configuration on the arguments that it
came with, and the fastest is kept. Kernels that read what they write run many times over their own results meanwhile:
only the times mean anything.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import mirage.fast
from mirage.losses import MirageLoss
from mirage_kernels._tuning import Tuning, launch_key

__all__ = ["Tuner", "tune"]

WARPS, STAGES = (2, 4, 8), (1, 2, 3)
BETTER = 0.97
"""A configuration replaces the built-in one where it takes at most so much of its time: less is noise."""


class Tuner:
    """A launch hook that chooses a configuration for each kind of launch, and launches.

    Attributes:
        launches: what it chose, where that is not the built-in configuration.
        times: milliseconds by kind of launch, built-in and chosen.
    """

    def __init__(self, time: Callable[[Callable[[], object]], float]) -> None:
        """`time`: the milliseconds that a call takes on the GPU."""
        self.launches: dict[str, dict[str, int]] = {}
        self.times: dict[str, tuple[float, float]] = {}
        self._time = time

    def __call__(self, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if programs == 0:
            return
        key = launch_key(kernel, args, options)
        if key not in self.times:
            self._choose(key, kernel, programs, args, options)
        kernel[(programs,)](*args, **(options | self.launches.get(key, {})))

    def _choose(self, key: str, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        built_in = self._time(lambda: kernel[(programs,)](*args, **options))
        best, chosen = built_in, {}
        for warps, stages in itertools.product(WARPS, STAGES):
            other = {"num_warps": warps, "num_stages": stages}
            if other.items() <= options.items():
                continue
            try:
                time = self._time(lambda other=other: kernel[(programs,)](*args, **(options | other)))
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # Triton's own: this kernel does not fit so
                    raise
                continue
            if time < best:
                best, chosen = time, other
        if best > BETTER * built_in:
            best, chosen = built_in, {}
        self.times[key] = built_in, best
        if chosen:
            self.launches[key] = chosen


def tune(
    variant: str, shapes: list[tuple[int, int, int, int]], dtypes: list[torch.dtype], step: bool = False
) -> tuple[Tuning, Tuner]:
    """Tune what a network launches on the current CUDA device.

    Args:
        variant: ``"tiny"`` or ``"small"``.
        shapes: [B, C, H, W] of the images.
        dtypes: of weights and images in inference; of autocast in training steps.
        step: training steps too.

    Returns:
        What to save, and the tuner with its times.
    """
    import triton.testing

    tuner = Tuner(lambda call: triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))
    build = {"tiny": mirage.fast.mirage_tiny, "small": mirage.fast.mirage_small}[variant]
    with _tuning(tuner):
        for shape, dtype in itertools.product(shapes, dtypes):
            image = torch.rand(shape, device="cuda")
            with torch.inference_mode():
                build().eval().to("cuda", dtype)(image.to(dtype))
            if step:
                _step(build().train().cuda(), image, dtype)
    torch.cuda.synchronize()
    return Tuning(torch.cuda.get_device_name(), importlib.metadata.version("triton"), tuner.launches), tuner


def _step(model: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        outputs = model(image, return_spd=True)
    MirageLoss(preset="released")(outputs, image)[0].backward()


@contextmanager
def _tuning(tuner: Tuner) -> Iterator[None]:
    from mirage_kernels import _triton

    _triton.launch_hook = tuner
    try:
        yield
    finally:
        _triton.launch_hook = None
