"""What was measured on one GPU, in the place of what is built in: warps and pipeline stages of Triton launches, and
which of Triton and CUDA C++ an operator runs on. Or on one CPU: the instruction set of the C++ kernels.

``mirage tune`` writes the file; the environment variable ``MIRAGE_TUNING`` names the one to read. It is read once, so
that every launch of a process, and every process that reads it, runs the same configuration: nothing is timed at run
time. Block sizes are not in it: they decide how sums are cut.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_kernels._runtime import transforms
from mirage_kernels._runtime.implementations import ON_GPUS

VARIABLE = "MIRAGE_TUNING"
VERSION = 1
LIMITS = {"num_warps": (1, 2, 4, 8, 16, 32), "num_stages": (1, 2, 3, 4, 5)}
"""What a launch takes of each."""
FP_FUSION: dict[str, Any] = {} if os.environ.get("TRITON_DEFAULT_FP_FUSION") else {"enable_fp_fusion": True}
"""Given to every launch and compilation: products and sums are contracted into fused multiply-adds. Triton does so by
default up to 3.9 and not after; its variable decides where it is set."""
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
"""Those of the C++ kernels, the lowest first."""
PIXELS = tuple(4**k for k in range(4, 13))
"""Where one class of sizes ends and the next begins: from 256 pixels of all samples together to 4096 x 4096."""


class _Saved:
    """What can be written to a file."""

    def save(self: Any, path: str | Path) -> None:
        """Write the file; one that is there is replaced at once, never half."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n")
        part.replace(path)


@dataclass(frozen=True)
class Tuning(_Saved):
    """The contents of a file of a GPU."""

    device: str  # the GPU's name
    triton: str  # its version, with which the kernels were compiled
    launches: dict[str, dict[str, int]] = field(default_factory=dict)  # by `launch_key`
    choices: dict[str, str] = field(default_factory=dict)  # implementations by `choice_key`


@dataclass(frozen=True)
class CpuTuning(_Saved):
    """The contents of a file of a CPU, which is known by its ``isa``."""

    device: str  # the processor's name
    isa: str  # one of `INSTRUCTION_SETS`


def launch_key(kernel: Any, args: Sequence[Any], options: Mapping[str, Any]) -> str:
    """What one configuration is good for: a kernel with its dtypes and constants."""
    dtypes = sorted({str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, Tensor)})
    constants = [f"{name}={value}" for name, value in sorted(options.items()) if name not in LIMITS]
    return " ".join((kernel.__name__, *dtypes, *constants))


def choice_key(operator: str, x: Tensor) -> str:
    """What one choice is good for: an operator on maps of this dtype and number of channels, of about this size."""
    channels = x.shape[1]
    pixels = x.shape[0] * math.prod(x.shape[2:])
    size = sum(pixels > limit for limit in PIXELS)
    return f"{operator} {str(x.dtype).removeprefix('torch.')} C={channels} size={size}"


def load(path: str | Path) -> Tuning | CpuTuning:
    """Read a file, of a GPU or a CPU.

    Raises:
        ValueError: it is not there or not what ``save`` writes, with the reason.
    """
    try:
        contents = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}: cannot read {str(path)!r}: {error}") from error
    version = contents.get("version") if isinstance(contents, dict) else None
    if version != VERSION:
        raise ValueError(f"{VARIABLE}: expected a file of version {VERSION} in {str(path)!r}, got {version!r}")
    try:
        return _of_cpu(contents) if "isa" in contents else _of_gpu(contents)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{VARIABLE}: {str(path)!r} is incomplete: {type(error).__name__} {error}") from error


def _of_cpu(contents: dict[str, Any]) -> CpuTuning:
    found = CpuTuning(contents["device"], contents["isa"])
    if found.isa not in INSTRUCTION_SETS:
        raise ValueError(f"{VARIABLE}: isa: expected one of {', '.join(INSTRUCTION_SETS)}, got {found.isa!r}")
    return found


def _of_gpu(contents: dict[str, Any]) -> Tuning:
    found = Tuning(contents["device"], contents["triton"], contents["launches"], contents.get("choices", {}))
    for key, choice in found.choices.items():
        if choice not in ON_GPUS:
            expected = " or ".join(ON_GPUS)
            raise ValueError(f"{VARIABLE}: choice of {key!r}: expected {expected}, got {choice!r}")
    for key, options in found.launches.items():
        for name, value in options.items():
            if value not in LIMITS[name]:
                allowed = ", ".join(map(str, LIMITS[name]))
                raise ValueError(f"{VARIABLE}: {name} of {key!r}: expected one of {allowed}, got {value!r}")
    return found


@functools.cache
def _read() -> Tuning | CpuTuning | None:
    path = os.environ.get(VARIABLE)
    return load(path) if path else None


def _active() -> Tuning | None:
    """What is active on GPUs."""
    found = _read()
    return found if isinstance(found, Tuning) else None


def of_cpu() -> CpuTuning | None:
    """What the file says of a CPU; None where it is of a GPU, or there is none.

    Raises:
        ValueError: as :func:`load`.
    """
    found = _read()
    return found if isinstance(found, CpuTuning) else None


@functools.cache
def _is_for(tuned: str, index: int | None) -> bool:
    device = torch.cuda.get_device_name(index)
    if device != tuned:
        warnings.warn(f"{VARIABLE} was measured on {tuned}; it is not used on {device}", stacklevel=4)
    return device == tuned


def apply(kernel: Any, device: torch.device, args: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch, tuned where the file has it and is of this GPU."""
    tuning = _active()
    if tuning is None or device.type != "cuda" or not _is_for(tuning.device, device.index):
        return options
    return options | tuning.launches.get(launch_key(kernel, args, options), {})


def _chosen(key: str, index: int | None) -> str | None:
    tuning = _active()
    return tuning.choices.get(key) if tuning is not None and _is_for(tuning.device, index) else None


named = bool(os.environ.get(VARIABLE))
"""Whether there is a file: a plain global, so that torch.compile traces past :func:`choice` where there is none."""
if named:
    _chosen = transforms.constant_where_compiled(_chosen)


def choice(operator: str, x: Tensor) -> str | None:
    """The implementation that was faster for such an `x` on its GPU, or None where the file does not say."""
    return _chosen(choice_key(operator, x), x.device.index) if named else None
