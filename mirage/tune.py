"""Measure on this machine's GPU what is faster: ``mirage tune --device cuda``.

A network runs; each Triton launch of a kind that has not been seen is timed with every number of warps and pipeline
stages on the arguments that it came with, and the fastest is kept. Kernels that read what they write run many times
over their own results meanwhile: only the times mean anything. Then it runs again, and each call of an operator that
exists in Triton and in CUDA C++ is timed on both; at last the levels of a network, as one call in CUDA C++ and as calls
of their stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mirage.fast
import mirage_kernels
from mirage.losses import MirageLoss
from mirage_kernels import FeedForwardWeights, MixerWeights
from mirage_kernels._runtime.implementations import ON_GPUS
from mirage_kernels._runtime.tuning import FP_FUSION, Tuning, choice_key, launch_key

__all__ = ["BETTER", "NETWORKS", "Chooser", "Tuner", "training_step", "tune"]

NETWORKS = {"tiny": mirage.fast.mirage_tiny, "small": mirage.fast.mirage_small}
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
        kernel[(programs,)](*args, **(options | self.launches.get(key, {})), **FP_FUSION)

    def _choose(self, key: str, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        built_in = self._time(lambda: kernel[(programs,)](*args, **options, **FP_FUSION))
        best, chosen = built_in, {}
        for warps, stages in itertools.product(WARPS, STAGES):
            other = {"num_warps": warps, "num_stages": stages}
            if other.items() <= options.items():
                continue
            try:
                time = self._time(partial(kernel[(programs,)], *args, **(options | other), **FP_FUSION))
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


class Chooser(TorchDispatchMode):
    """Times each call of an operator on both implementations for GPUs, the first time that one of its kind comes by. A
    level of a network as one call, which exists in CUDA C++ alone, is timed beside its stages as they were chosen.

    Attributes:
        choices: the faster one, where that is not Triton.
        times: milliseconds by kind of call, of Triton and of CUDA C++.
    """

    def __init__(self, time: Callable[[Callable[[], object]], float]) -> None:
        """`time`: the milliseconds that a call takes on the GPU."""
        super().__init__()
        self.choices: dict[str, str] = {}
        self.times: dict[str, tuple[float, float]] = {}
        self._time = time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mirage_kernels" and args and args[-1] in ON_GPUS:
            name = func._schema.name.split("::")[1]
            if name == "transformer_blocks":
                self.compare(name, args[0], partial(self._by_stages, *args[:-1]), partial(func, *args))
            else:
                x = args[name.endswith("_backward")]  # which comes after the gradient of the output
                self.compare(name, x, *(partial(func, *args[:-1], impl) for impl in ON_GPUS))
        return func(*args, **(kwargs or {}))

    def compare(self, name: str, x: torch.Tensor, triton: Callable[[], object], cuda: Callable[[], object]) -> None:
        """Time both ways of calling an operator, where no call of its kind has been."""
        key = choice_key(name, x)
        if key in self.times or x.numel() == 0:
            return
        self.times[key] = self._time(triton), self._time(cuda)
        if self.times[key][1] < BETTER * self.times[key][0]:
            self.choices[key] = "cuda"

    def _by_stages(self, x: torch.Tensor, weights: Sequence[torch.Tensor], eps: Sequence[float]) -> torch.Tensor:
        """The arguments of the operator ``transformer_blocks``, on the stages."""
        mixer_size, each = len(MixerWeights._fields), len(weights) * 3 // len(eps)
        for i in range(len(eps) // 3):
            of_block = weights[i * each : (i + 1) * each]
            mixer, feed_forward = MixerWeights(*of_block[:mixer_size]), FeedForwardWeights(*of_block[mixer_size:])
            norm1_eps, bn_eps, norm2_eps = eps[3 * i : 3 * i + 3]
            with self._on_chosen("mixer_stage", x):
                x = mirage_kernels.mixer_stage(x, mixer, None, False, norm1_eps, bn_eps).y
            with self._on_chosen("feed_forward_stage", x):
                x = mirage_kernels.feed_forward_stage(x, *feed_forward, eps=norm2_eps)
        return x

    def _on_chosen(self, name: str, x: torch.Tensor) -> AbstractContextManager[None]:
        """Inside, an operator runs on such an `x` as was chosen."""
        return mirage_kernels.use(self.choices.get(choice_key(name, x), "triton"))


def tune(
    variant: str, shapes: list[tuple[int, int, int, int]], dtypes: list[torch.dtype], step: bool = False
) -> tuple[Tuning, Tuner, Chooser]:
    """Tune what a network launches on the current CUDA device.

    Args:
        variant: ``"tiny"`` or ``"small"``.
        shapes: [B, C, H, W] of the images.
        dtypes: of weights and images in inference; of autocast in training steps.
        step: training steps too.

    Returns:
        What to save, and what has been measured for it. Without the CUDA library there is nothing to choose between.
    """
    import triton
    from triton.testing import do_bench, do_bench_cudagraph

    tuner = Tuner(lambda call: do_bench(call, warmup=5, rep=20, return_mode="median"))
    chooser = Chooser(lambda call: do_bench_cudagraph(call, rep=20, return_mode="median"))  # without Python's own time
    cases = list(itertools.product(shapes, dtypes))
    with _tuning(tuner):
        _run(variant, cases, step)
        if mirage_kernels.available()["cuda"] == "yes":
            with mirage_kernels.use("triton"), chooser:
                _run(variant, cases, step)
            with mirage_kernels.use("cuda"), chooser:
                _run(variant, cases, step=False)
    torch.cuda.synchronize()
    found = Tuning(torch.cuda.get_device_name(), triton.__version__, tuner.launches, chooser.choices)
    return found, tuner, chooser


def _run(variant: str, cases: list[tuple[tuple[int, int, int, int], torch.dtype]], step: bool) -> None:
    """The network on each shape and dtype, and training steps where they are asked for."""
    build = NETWORKS[variant]
    for shape, dtype in cases:
        image = torch.rand(shape, device="cuda")
        with torch.inference_mode():
            build().eval().to("cuda", dtype)(image.to(dtype))
        if step:
            training_step(build().train().cuda(), image, dtype)


def training_step(model: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype) -> None:
    """Forward and backward on images [B, C, H, W] of float32, under autocast to `dtype`."""
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        outputs = model(image, return_spd=True)
    MirageLoss(preset="released")(outputs, image)[0].backward()


@contextmanager
def _tuning(tuner: Tuner) -> Iterator[None]:
    from mirage_kernels._triton import launch

    launch.launch_hook = tuner
    try:
        yield
    finally:
        launch.launch_hook = None
