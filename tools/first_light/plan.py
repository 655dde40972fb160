"""What is run, in which order and for how long: the parts on a GPU (:func:`on_gpu`), and the same on tiny shapes
without one (:func:`dry`). Within a part the most valuable comes first: what is not reached is at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mirage_kernels._runtime.cases import DIMS, Operator, levels, operators
from tools.first_light.pool import Task

DTYPES = ("bfloat16", "float32", "float16")
KERNELS = ("triton", "cuda")
HALVES = ("mixer", "ffn")
BUILD_SECONDS = 180.0
IMAGES = ((224, 224), (1080, 1920), (512, 512))
CROPS = (32, 128)
"""Samples and side of a training step's images."""
FILLING = (64, 64)
"""A map that is large enough for the kernels of every stage (on smaller ones some leave the work to others)."""


@dataclass(frozen=True)
class Part:
    """Tasks that share a time.

    Attributes:
        seconds: its own; a part ends when all those up to it are over, whoever of them took less.
        workers: how many of its tasks run at a time.
        beside_build: whether it runs while the library is built: with the Python sources of the checkout, on a machine
            that is busy.
    """

    name: str
    seconds: float
    tasks: list[Task] = field(default_factory=list)
    workers: int = 1
    beside_build: bool = False


def parts(named: Iterator[tuple[Part, str, dict[str, Any], float]]) -> list[Part]:
    """Each part with its tasks, from (part, kind, arguments, seconds) in order."""
    found: dict[str, Part] = {}
    for part, kind, arguments, seconds in named:
        found.setdefault(part.name, part).tasks.append(Task(part.name, kind, arguments, seconds))
    return list(found.values())


def cases(implementation: str) -> list[Operator]:
    """The operators that have such kernels, stages first."""
    return sorted((op for op in operators() if implementation in op.implementations), key=lambda op: not op.is_stage)


def of_case(case: Operator, implementation: str, dtype: str, shape: Any, size: str, device: str) -> dict[str, Any]:
    named = {"name": case.name, "mode": case.mode, "implementation": implementation, "dtype": dtype}
    return {**named, "shape": list(shape), "size": size, "device": device}


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu() -> list[Part]:
    many = max(2, min(12, (os.cpu_count() or 4) - 2))
    first = Part("truth in Triton", 120, workers=many, beside_build=True)
    warm = Part("compiled ahead", 60, workers=many, beside_build=True)
    second = Part("truth in CUDA C++", 60, workers=min(8, many))
    inference, step, stages = Part("inference", 100), Part("training step, Table 6", 50), Part("stages", 75)
    safety, compiled = Part("safety", 65, workers=4), Part("torch.compile", 40)

    def tasks() -> Iterator[tuple[Part, str, dict[str, Any], float]]:
        yield first, "machine", {"device": "cuda"}, 60.0
        yield from ((first, *task) for task in truths("triton"))
        yield from ((warm, *task) for task in compiled_ahead())
        yield from ((second, *task) for task in truths("cuda"))
        yield inference, "rates", {"device": "cuda"}, 20.0
        yield from ((inference, *task) for task in networks())
        yield from ((step, *task) for task in steps())
        yield from ((stages, *task) for task in halves())
        yield from ((safety, *task) for task in checks())
        yield from ((compiled, *task) for task in networks_of_pytorch())

    return parts(tasks())


Work = Iterator[tuple[str, dict[str, Any], float]]


def truths(implementation: str) -> Work:
    """Three sizes of every operator: a block of MIRAGE-T for 128x128, its first level at 256x256, and a few pixels; the
    golden network; then stages at every width of both networks."""
    mine = cases(implementation)
    sizes = {
        "64x64": lambda op: op.in_network(DIMS["tiny"], 128)[:3][-1],
        "256x256": lambda op: op.in_network(DIMS["tiny"], 256)[0],
        "small": lambda op: op.shapes[0],
    }
    for size, shape in sizes.items():
        for dtype in DTYPES:
            for op in mine:
                yield "operator", of_case(op, implementation, dtype, shape(op), size, "cuda"), 60.0
        if size == "64x64":
            for case in ("mirage_mini_16x24", "mirage_tiny_64x64"):
                for mode in ("eval", "train"):
                    named = {"case": case, "mode": mode, "implementation": implementation, "device": "cuda"}
                    yield "golden", named, 90.0
    for op in mine:
        if op.is_stage and op.gradients:
            for dim in DIMS.values():
                for batch, channels, _, _, *heads in op.in_network(dim, 256):
                    for dtype in ("bfloat16", "float32"):
                        shape, size = (batch, channels, *FILLING, *heads), f"{channels} channels"
                        yield "operator", of_case(op, implementation, dtype, shape, size, "cuda"), 60.0


def compiled_ahead() -> Work:
    """Half by half what Triton compiles for the networks that are timed, and networks of torch.compile."""
    count, side = CROPS
    trained = [(v, count, level, "bfloat16", True) for v in DIMS for level in levels(DIMS[v], side, side)]
    passes = [
        (variant, 1, level, dtype, False)
        for dtype in ("bfloat16", "float32")
        for image in IMAGES
        for variant in DIMS
        for level in levels(DIMS[variant], *image)
    ]
    for variant, batch, level, dtype, training in passes[:10] + trained + passes[10:]:
        for half in HALVES:
            named = {"half": half, "level": list(level), "batch": batch, "dtype": dtype, "training": training}
            yield "warm", {**named, "device": "cuda", "variant": variant}, 60.0
    for variant in DIMS:
        named = {"variant": variant, "shape": [1, 3, 224, 224], "dtype": "bfloat16", "peer": "compile-default"}
        yield "ahead", {**named, "device": "cuda"}, 180.0


def networks() -> Work:
    for peers in (("eager", "fast", "graph"), ("graph-cuda", "cuda")):
        for dtype in ("bfloat16", "float32"):
            for image in IMAGES:
                for variant in DIMS:
                    for peer in peers:
                        named = {"variant": variant, "shape": [1, 3, *image], "dtype": dtype, "peer": peer}
                        yield "inference", {**named, "device": "cuda", "seconds": 0.3}, 40.0
    for variant in DIMS:
        for peer in ("eager", "fast", "graph", "graph-cuda"):
            named = {"variant": variant, "shape": [1, 3, 1080, 1920], "dtype": "float32", "peer": peer, "tf32": True}
            yield "inference", {**named, "device": "cuda", "seconds": 0.3}, 40.0


def steps() -> Work:
    count, side = CROPS
    for variant in DIMS:
        for peer in ("eager", "fast-low", "graph-low", "low-cuda"):
            named = {"variant": variant, "shape": [count, 3, side, side], "dtype": "bfloat16", "peer": peer}
            yield "step", {**named, "device": "cuda", "seconds": 0.5}, 45.0
    for variant in ("T", "S"):
        for implementation in ("reference", "fast"):
            named = {"variant": variant, "implementation": implementation, "size": 224, "device": "cuda"}
            yield "memory", named, 30.0


def halves() -> Work:
    count, side = CROPS
    forward = {image: levels(DIMS["tiny"], *image) for image in IMAGES}
    chosen = [(1, level, "bfloat16", False) for level in forward[(1080, 1920)]]
    chosen += [(count, level, "bfloat16", True) for level in levels(DIMS["tiny"], side, side)]
    chosen += [(1, level, "bfloat16", False) for level in forward[(224, 224)]]
    chosen += [(1, level, "float32", False) for level in forward[(1080, 1920)]]
    for batch, level, dtype, both in chosen:
        for half in HALVES:
            for implementation in (*KERNELS, "eager"):
                named = {"half": half, "level": list(level), "batch": batch, "dtype": dtype, "both": both}
                yield "stage", {**named, "implementation": implementation, "device": "cuda", "seconds": 0.1}, 30.0


def checks() -> Work:
    """Three runs of the sanitizer at a time, stages apart, and the rest."""
    names = list(dict.fromkeys(op.name for op in cases("cuda")))
    mixer = [name for name in names if name in ("mixer_stage", "transformer_blocks")]
    feed_forward = ["feed_forward_stage"]
    rest = [name for name in names if name not in (*mixer, *feed_forward)]
    for group in (mixer, feed_forward, rest):
        yield "sanitizer", {"names": group, "dtypes": list(DTYPES), "device": "cuda"}, 60.0
    offsets = ["tests/kernels/test_triton_offsets.py", "tests/kernels/test_triton_stages.py"]
    yield "tests", {"targets": offsets, "words": "far or offsets", "device": "cuda"}, 60.0
    far = ["tests/kernels/test_cuda.py", "tests/kernels/test_cuda_mixer.py", "tests/kernels/test_streams.py"]
    yield "tests", {"targets": far, "words": "far or offsets or streams", "device": "cuda"}, 60.0
    for dtype in ("bfloat16", "float32"):
        for implementation in KERNELS:
            for op in cases(implementation):
                shape = op.in_network(DIMS["tiny"], 128)[:3][-1]
                yield "repeats", of_case(op, implementation, dtype, shape, "64x64", "cuda"), 40.0


def networks_of_pytorch() -> Work:
    chosen = [(image, peer) for peer in ("compile-default", "compile") for image in IMAGES]
    for image, peer in chosen:
        for dtype in ("bfloat16", "float32"):
            for variant in DIMS:
                named = {"variant": variant, "shape": [1, 3, *image], "dtype": dtype, "peer": peer}
                yield "inference", {**named, "device": "cuda", "seconds": 0.3}, 240.0


# ---- without one ---------------------------------------------------------------------------------------------------

SMALLEST = {"channel_layer_norm": (1, 3, 1, 13), "feed_forward_stage": (1, 3, 1, 1), "mixer_stage": (1, 6, 1, 13, 1)}
"""Shapes of the operators that are tried without a GPU, in seconds."""
LONG = 300.0
"""Seconds for a part and for a task: no machine is so slow."""


def dry() -> list[Part]:
    """Every kind of task, in every part, on the CPU: Triton in its interpreter, CUDA C++ emulated."""
    place: dict[str, Any] = {"device": "cpu"}
    timed = {**place, "seconds": 0.0}
    first = Part("truth in Triton", LONG, workers=2, beside_build=True)
    warm, second = (
        Part("compiled ahead", LONG, workers=2, beside_build=True),
        Part("truth in CUDA C++", LONG, workers=2),
    )
    inference, step, stages = Part("inference", LONG), Part("training step, Table 6", LONG), Part("stages", LONG)
    safety, compiled = Part("safety", LONG, workers=2), Part("torch.compile", LONG)
    image = {"variant": "tiny", "shape": [1, 3, 16, 16]}
    level = {"level": [6, 1, 4, 5], "batch": 1}

    def tasks() -> Iterator[tuple[Part, str, dict[str, Any], float]]:
        yield first, "machine", place, LONG
        yield from ((first, *task) for task in tiny_truths("triton", ("channel_layer_norm", "feed_forward_stage")))
        yield warm, "warm", {"half": "ffn", **level, "dtype": "float32", "training": False, **place}, LONG
        yield warm, "warm", {"half": "mixer", **level, "dtype": "bfloat16", "training": True, **place}, LONG
        yield warm, "ahead", {**image, "dtype": "float32", "peer": "compile-default", **place}, LONG
        yield from ((second, *task) for task in tiny_truths("cuda", tuple(SMALLEST)))
        golden = {"case": "mirage_mini_16x24", "mode": "eval", "implementation": "cuda"}
        yield second, "golden", {**golden, **place}, LONG
        yield inference, "rates", place, LONG
        for peer in ("eager", "fast", "graph", "cuda"):
            yield inference, "inference", {**image, "dtype": "float32", "peer": peer, **timed}, LONG
        yield inference, "inference", {**image, "dtype": "bfloat16", "peer": "fast", **timed}, LONG
        for peer in ("eager", "fast-low", "graph-low"):
            crops = {"variant": "tiny", "shape": [2, 3, 16, 16], "dtype": "float32", "peer": peer}
            yield step, "step", {**crops, **timed}, LONG
        yield step, "memory", {"variant": "T", "implementation": "fast", "size": 16, **place}, LONG
        for half, implementation in (("ffn", "eager"), ("ffn", "cuda"), ("ffn", "triton"), ("mixer", "cuda")):
            named = {"half": half, **level, "dtype": "float32", "both": half == "ffn", "implementation": implementation}
            yield stages, "stage", {**named, **timed}, LONG
        names = ["channel_layer_norm", "feed_forward_stage"]
        yield safety, "sanitizer", {"names": names, "dtypes": ["float32"], "without": True, **place}, LONG
        offsets = {"targets": ["tests/kernels/test_triton_offsets.py"], "words": "channel_layer_norm"}
        yield safety, "tests", {**offsets, **place}, LONG
        for implementation in KERNELS:
            (case,) = operators(["channel_layer_norm"])
            yield safety, "repeats", of_case(case, implementation, "float32", case.shapes[0], "small", "cpu"), LONG
        yield compiled, "inference", {**image, "dtype": "float32", "peer": "compile", **timed}, LONG

    return parts(tasks())


def tiny_truths(implementation: str, names: tuple[str, ...]) -> Work:
    for op in cases(implementation):
        if op.name in names and not op.mode:
            for dtype in DTYPES:
                yield "operator", of_case(op, implementation, dtype, SMALLEST[op.name], "small", "cpu"), LONG
