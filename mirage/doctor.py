"""What runs here and whether it is right: ``mirage doctor``.

Every operator is run on small tensors by every implementation that can run, forward and backward, and compared with the
same expression in float64. An implementation may be twice as far from that truth as PyTorch in the same dtype is.
``mirage doctor --gpu`` does so on a GPU, on images large enough for every kernel there, in all dtypes, and times them.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.benchmark
from torch import Tensor

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Check",
    "OperatorCase",
    "Report",
    "cases",
    "check_operators",
    "cpu_name",
    "examine",
    "package_version",
    "render",
]

DISTRIBUTION = "mirage-kernels"
WITHIN = 2.0
"""An implementation's error may be this many times that of PyTorch in the same dtype."""
FLOOR = 4
"""Relative error, in epsilons of the dtype, below which a result passes whatever PyTorch's own error is: a few
roundings of the result itself."""
EQUIVALENTS = 4
"""Inputs that differ in their last bits, of which PyTorch's largest error counts: a gradient of a few numbers, each a
sum over all pixels, is near the truth or not by luck."""
IMAGE = (2, 6, 7, 9)
GPU_IMAGE = (2, 24, 130, 150)
"""With enough tiles for the kernels of whole stages."""
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SECONDS = 0.2
"""For which each call is repeated where it is timed."""
EVERY = ("torch", "cpp", "triton", "cuda")
"""Implementations of the operators that are written in CUDA C++ too."""
CPU_FLAGS = "avx2 fma f16c avx512f avx512bw avx512vl avx512_bf16 avx512_fp16 amx_bf16 asimd sve".split()


@dataclass(frozen=True)
class OperatorCase:
    """How to check one operator.

    Attributes:
        name: of the public function in ``mirage_kernels``.
        shapes: of its tensor arguments, in order.
        rest: the other arguments.
        rest_at: the position at which those stand among the tensors; after them by default.
        shift: added to the normal random values, one number per tensor.
        adapt: turns a public function that takes or returns anything else into one of tensors, returning one.
        implementations: those that the operator has.
        gradients: whether to check them too.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple[Any, ...] = ()
    shift: tuple[float, ...] = ()
    rest_at: int | None = None
    adapt: Callable[[Callable[..., Any]], Callable[..., Tensor]] | None = None
    implementations: tuple[str, ...] = EVERY
    gradients: bool = True

    def tensors(self) -> list[Tensor]:
        """The tensor arguments in float64, holding float32 values; the same at every call."""
        generator = torch.Generator().manual_seed(20260)
        shifts = self.shift or (0.0,) * len(self.shapes)
        pairs = zip(self.shapes, shifts, strict=True)
        return [(torch.randn(shape, generator=generator) + shift).double() for shape, shift in pairs]

    def arguments(self, tensors: list[Tensor]) -> list[Any]:
        """``tensors`` and the other arguments in the operator's order."""
        at = len(tensors) if self.rest_at is None else self.rest_at
        return [*tensors[:at], *self.rest, *tensors[at:]]


@dataclass(frozen=True)
class Check:
    """One operator run by one implementation on one device.

    Attributes:
        dtype: of the tensors, such as ``float32``.
        error: largest relative error (norm of the difference over norm of the truth) of the output and the gradients.
        where: the tensor it occurred in: ``output``, ``grad 0``, ``grad 1``, ... by argument, or ``grad of scalars``.
        limit: largest error allowed for that tensor.
        problem: what went wrong instead of a comparison, or None.
        milliseconds: median time of forward and backward (of forward, for an operator without gradients), or None.
    """

    operator: str
    implementation: str
    device: str
    dtype: str
    error: float | None
    where: str
    limit: float | None
    problem: str | None = None
    milliseconds: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every tensor was within its limit."""
        if self.problem is not None or self.error is None or self.limit is None:
            return False
        return self.error <= self.limit


@dataclass(frozen=True)
class Report:
    """Everything ``mirage doctor`` found."""

    versions: dict[str, str]
    devices: list[dict[str, Any]]
    implementations: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {**asdict(self), "checks": checks, "healthy": self.healthy}


def cases(image: tuple[int, ...] = IMAGE) -> tuple[OperatorCase, ...]:
    """One case per public operator, with what makes each hard: an offset mean, pixels that are no multiple of a vector,
    more than one head. `image`: [B, C, H, W], C a multiple of 6."""
    from mirage_kernels.feed_forward_stage.weights import shapes as feed_forward_shapes

    heads, (batch, channels, *size) = 2, image
    return (
        OperatorCase("channel_layer_norm", (image, (channels,), (channels,)), (1e-5,), shift=(3.0, 1.0, 0.0)),
        OperatorCase("gated_depthwise_ffn", ((batch, 2 * channels, *size), (2 * channels, 1, 3, 3))),
        OperatorCase("dynamic_depthwise_conv2d", (image, (batch, channels, 7, 7))),
        OperatorCase("dense_conv2d", (image, (10, channels, 3, 3)), implementations=("torch", "cpp")),
        OperatorCase("channel_attention", (image, image, image, (heads, 1, 1)), (heads,), shift=(0, 0, 0, 1.0)),
        OperatorCase(
            "channel_attention_fusion",
            (image, image, image, (heads, 1, 1), image, image, (1,), (1,), (1,)),
            (heads,),
            shift=(0, 0, 0, 1.0, 0, 0, 0, 0, 0),
            rest_at=4,
        ),
        OperatorCase("tri_branch_fusion", (image, image, image, (1,), (1,), (1,))),
        OperatorCase("spd_covariance", (image,), (1e-5,), shift=(3.0,)),
        OperatorCase(
            "feed_forward_stage",
            (image, *feed_forward_shapes(channels, 2 * channels).values()),
            (1e-5,),
            shift=(3.0, 1.0, 0, 0, 0, 0),
        ),
        _mixer_case(image),
        _block_case(image),
    )


_SHIFTS = {"norm_weight": 1.0, "temperature": 2.0, "bn_weight": 1.0, "gate_temperature": 4.0}


def _mixer_weights(learned: Sequence[Tensor]) -> Any:
    """Weights with the running statistics of a fresh batch norm."""
    from mirage_kernels import MixerWeights
    from mirage_kernels.mixer_stage.weights import LEARNED

    named = dict(zip(LEARNED, learned, strict=True))
    mean, var = torch.zeros_like(named["bn_weight"]), torch.ones_like(named["bn_weight"])
    return MixerWeights(**named, bn_mean=mean.detach(), bn_var=var.detach())


def _mixer_case(image: tuple[int, ...]) -> OperatorCase:
    from mirage_kernels.mixer_stage.weights import LEARNED, shapes

    of_weights = shapes(channels=image[1], heads=2, hidden=5)
    return OperatorCase(
        "mixer_stage",
        (image, *(of_weights[name] for name in LEARNED)),
        shift=(3.0, *(_SHIFTS.get(name, 0.0) for name in LEARNED)),
        adapt=lambda function: lambda x, *learned: function(x, _mixer_weights(learned)).y,
    )


def _block_case(image: tuple[int, ...]) -> OperatorCase:
    from mirage_kernels import BlockWeights, FeedForwardWeights
    from mirage_kernels.feed_forward_stage.weights import shapes as feed_forward_shapes
    from mirage_kernels.mixer_stage.weights import LEARNED, shapes

    of_mixer, of_feed_forward = shapes(image[1], heads=2, hidden=5), feed_forward_shapes(image[1], pairs=7)
    shift = [_SHIFTS.get(name, 0.0) for name in (*LEARNED, *of_feed_forward)]

    def flat(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(x: Tensor, *weights: Tensor) -> Tensor:
            mixer = _mixer_weights(weights[: len(LEARNED)])
            block = BlockWeights(mixer, FeedForwardWeights(*weights[len(LEARNED) :]))
            return function(x, [block, block])

        return call

    tensors = (image, *(of_mixer[name] for name in LEARNED), *of_feed_forward.values())
    # Its gradients are those of its halves; where none is wanted it may run as one operator.
    options: dict[str, Any] = {"adapt": flat, "gradients": False}
    return OperatorCase("transformer_blocks", tensors, shift=(3.0, *shift), **options)


def examine(*, check: bool = True, gpu: bool = False) -> Report:
    """Collect versions, devices and implementations, and with ``check`` run :func:`check_operators`.

    Args:
        gpu: check what runs on a GPU, in `GPU_DTYPES` on `GPU_IMAGE`, and time it.
    """
    import mirage_kernels

    run = partial(check_operators, cases(GPU_IMAGE), "cuda", GPU_DTYPES, timed=True) if gpu else check_operators
    return Report(
        versions=_versions(),
        devices=_devices(),
        implementations=dict(mirage_kernels.available()),
        checks=run() if check else (),
    )


def check_operators(
    operators: Sequence[OperatorCase] | None = None,
    device: str | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    timed: bool = False,
) -> tuple[Check, ...]:
    """Check each operator on each implementation and device that can run, forward and backward.

    Args:
        operators: what to check; :func:`cases` by default.
        device: ``"cpu"`` or ``"cuda"``; all by default.
        dtypes: of the tensors.
        timed: also time each call, for `SECONDS`.
    """
    import mirage_kernels

    runnable = [name for name, state in mirage_kernels.available().items() if state == "yes"]
    checks = []
    for case in cases() if operators is None else operators:
        function = getattr(mirage_kernels, case.name, None)
        if function is None:
            checks.append(Check(case.name, "-", "-", "-", None, "", None, "mirage_kernels has no such operator"))
            continue
        for dtype in dtypes:
            limits: dict[str, dict[str, float]] = {}  # by device
            for implementation in filter(case.implementations.__contains__, runnable):
                for place in _devices_of(implementation):
                    if device in (None, place):
                        checks.append(_check(case, function, implementation, place, dtype, limits, timed))
    return tuple(checks)


def _devices_of(implementation: str) -> list[str]:
    gpu = ["cuda"] if torch.cuda.is_available() else []
    on_host = {"triton": "TRITON_INTERPRET", "cuda": "MIRAGE_CUDA_EMULATE"}.get(implementation)
    if on_host is not None:
        return ["cpu"] if os.environ.get(on_host) == "1" else gpu
    return {"torch": ["cpu", *gpu], "cpp": ["cpu"]}.get(implementation, [])


def _check(
    case: OperatorCase,
    function: Callable[..., Tensor],
    implementation: str,
    device: str,
    dtype: torch.dtype,
    limits: dict[str, dict[str, float]],
    timed: bool,
) -> Check:
    import mirage_kernels

    check = partial(Check, case.name, implementation, device, str(dtype).removeprefix("torch."))
    tensors, milliseconds = [t.to(dtype) for t in case.tensors()], None
    try:
        truth = _named(_run(case, function, "torch", [t.double() for t in tensors]))
        if device not in limits:
            limits[device] = _limits(case, function, tensors, truth, device)
        results = _named(_run(case, function, implementation, [t.to(device) for t in tensors]))
        ran = mirage_kernels.last_used(case.name)
        if timed:
            weights = _weights(results["output"]).to(device, dtype)
            call = partial(_run, case, function, implementation, [t.to(device) for t in tensors], weights)
            timer = torch.utils.benchmark.Timer("call()", globals={"call": call})
            milliseconds = 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median
    except Exception as error:  # a broken kernel may raise anything; the others are still to be checked
        return check(None, "", None, f"{type(error).__name__}: {error}")
    if ran != implementation:
        return check(None, "", None, f"{ran} ran in its place")
    errors = {where: _relative_error(results[where], truth[where]) for where in limits[device]}
    where = _worst(errors, limits[device])
    return check(errors[where], where, limits[device][where], milliseconds=milliseconds)


def _worst(errors: dict[str, float], limits: dict[str, float]) -> str:
    """Where the error is farthest from its limit; NaN is farther than any number."""
    return max(errors, key=lambda where: math.inf if math.isnan(errors[where]) else errors[where] / limits[where])


def _limits(
    case: OperatorCase, function: Callable[..., Tensor], tensors: list[Tensor], truth: dict[str, Tensor], device: str
) -> dict[str, float]:
    """The largest error allowed for each result, from those of PyTorch on `tensors` and on some like them."""
    eps, generator = torch.finfo(tensors[0].dtype).eps, torch.Generator().manual_seed(17)
    limits = dict.fromkeys(truth, FLOOR * eps)
    for i in range(EQUIVALENTS):
        if i > 0:
            noise = [eps * torch.randn(t.shape, generator=generator) for t in tensors]
            tensors = [(t.double() * (1 + n)).to(t.dtype) for t, n in zip(tensors, noise, strict=True)]
            truth = _named(_run(case, function, "torch", [t.double() for t in tensors]))
        eager = _named(_run(case, function, "torch", [t.to(device) for t in tensors]))
        for where, expected in truth.items():
            limits[where] = max(limits[where], WITHIN * _relative_error(eager[where], expected))
    return limits


def _run(
    case: OperatorCase, function, implementation: str, tensors: Sequence[Tensor], weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The output of a case and, where it has them, the gradient of each tensor argument, of the output times
    `weights`."""
    import mirage_kernels

    inputs = [t.detach().requires_grad_(case.gradients) for t in tensors]
    with mirage_kernels.use(implementation):
        output = (case.adapt(function) if case.adapt else function)(*case.arguments(inputs))
        if not case.gradients:
            return (output,)
        weights = _weights(output).to(output) if weights is None else weights
        return output, *torch.autograd.grad(output, inputs, weights)


def _weights(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(77))


def _named(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """In float64 on the CPU, by name."""
    output, *grads = results
    named = {"output": output, **{f"grad {i}": grad for i, grad in enumerate(grads) if grad.numel() > 1}}
    # A single number is a sum that may cancel to almost nothing: these are compared as one vector.
    if scalars := [grad.flatten() for grad in grads if grad.numel() == 1]:
        named["grad of scalars"] = torch.cat(scalars)
    return {where: tensor.detach().double().cpu() for where, tensor in named.items()}


def _relative_error(result: Tensor, expected: Tensor) -> float:
    """Where the truth is exactly zero (the temperature's gradient of heads with one channel) only zero is right."""
    difference = (result - expected).norm()
    return 0.0 if difference == 0 else (difference / expected.norm()).item()


def package_version() -> str:
    """Version of the installed distribution, or of the source tree where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        import mirage_kernels

        return f"{getattr(mirage_kernels, '__version__', 'unknown')} (not installed)"


def cpu_name() -> str:
    """What the processor calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The first value of one of ``keys`` in /proc/cpuinfo; empty where there is none, such as outside Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in keys:
                    return value.strip()
    except OSError:
        pass
    return ""


def _versions() -> dict[str, str]:
    from mirage_kernels._runtime.dispatch import triton_version

    versions = {DISTRIBUTION: package_version(), "python": platform.python_version(), "torch": torch.__version__}
    versions["triton"] = triton_version() or "not installed"
    for name in ("numpy", "pillow", "imagecodecs", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.version.cuda or (f"HIP {torch.version.hip}" if torch.version.hip else None)
    versions["CUDA of torch"] = cuda or "none (CPU build)"
    versions["platform"] = platform.platform()
    return versions


def _devices() -> list[dict[str, Any]]:
    present = set(_cpuinfo("flags", "Features").split())
    cpu = {
        "device": "cpu",
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "vector level of torch": torch.backends.cpu.get_cpu_capability(),
        "features": " ".join(flag for flag in CPU_FLAGS if flag in present),
    }
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory MiB": properties.total_memory >> 20,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return [cpu, *gpus]


def render(report: Report, console: Console) -> None:
    """Print the report to a rich console."""
    from rich.table import Table
    from rich.text import Text

    def two_columns(title: str, pairs) -> None:
        table = Table(title=title, title_justify="left", show_header=False)
        for key, value in pairs:
            table.add_row(Text(str(key)), Text(str(value)))
        console.print(table)

    two_columns("Versions", report.versions.items())
    for device in report.devices:
        two_columns(device["device"], ((k, v) for k, v in device.items() if k != "device"))
    two_columns("Implementations", report.implementations.items())
    if not report.checks:
        return
    table = Table(title="Operators against float64 (forward and backward)", title_justify="left")
    timed = any(check.milliseconds is not None for check in report.checks)
    columns = ("Operator", "Implementation", "Device", "Dtype", "Worst error", "Allowed", "In", "Result")
    for column in (*columns, "ms") if timed else columns:
        table.add_column(column, justify="right" if column in ("Worst error", "Allowed", "ms") else "left")
    for check in report.checks:
        error, limit = (f"{v:.1e}" if v is not None else "-" for v in (check.error, check.limit))
        result = Text("ok", "green") if check.passed else Text(check.problem or "too far off", "bold red")
        time = [] if not timed else ["-" if check.milliseconds is None else f"{check.milliseconds:.3f}"]
        where = (check.operator, check.implementation, check.device, check.dtype)
        table.add_row(*where, error, limit, check.where, result, *time)
    console.print(table)
    failed = sum(not check.passed for check in report.checks)
    console.print(f"{len(report.checks)} checks, {failed} failed" if failed else f"{len(report.checks)} checks passed")
