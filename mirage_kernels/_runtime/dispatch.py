"""Which implementation of an operator runs, and why.

Every operator has its plain PyTorch reference, ``"torch"``, which runs anywhere. Beside it there are kernels for CPUs
(``"cpp"``) and for GPUs (``"triton"``, and ``"cuda"``: CUDA C++ for NVIDIA's).

There is one way to decline a call: a predicate that gives the reason in a sentence, or nothing where the call can run.
:func:`_problem` is that of an implementation on a machine, a device and a dtype; an operator has one for what it lacks
or what its kernels do not take (`declined` of :func:`choose`), and the modules of a stage have ``forward_problem`` and
``backward_problem`` (see :class:`mirage_kernels._runtime.library.Implementations`). A call runs on the first for its
device that has no reason against it; :func:`why_not` tells those against the others. :func:`use` and the environment
variable ``MIRAGE_KERNELS`` force one: the same predicates then raise, with the same reasons.

For tests without a GPU, ``TRITON_INTERPRET=1`` and ``MIRAGE_CUDA_EMULATE=1`` let kernels of the two run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mirage_kernels._runtime import instruction_set, transforms, tuning
from mirage_kernels._runtime.implementations import IMPLEMENTATIONS, KERNELS, ON_GPUS, RANKED

OLDEST_TRITON = (3, 4)
"""The first whose compiler takes every kernel; earlier ones end the whole process in a failed assertion at some."""
TRITON_PACKAGES = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-windows")
"""Under which names the module ``triton`` is distributed."""
NONE: dict[str, str] = {}
"""No implementation declines."""
COMPOSITE_ON = ("cpu", "cuda")
"""Devices whose backward pass, autocast and memory the composites of stages were written for."""
INTERFACE = 3
"""Counted up, with that of csrc/python/interface.h, whenever what the libraries' functions take or return changes."""
_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def _find_openmp() -> None:
    """The extension has OpenMP from PyTorch, whose symbols every library sees; from the system where it hides them."""
    if sys.platform == "linux" and not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        with contextlib.suppress(OSError):
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def _load(module: str, why_missing: str) -> tuple[Any, str]:
    """An extension module, or None and the reason. A missing extension, a broken one and an old one read differently.

    Who has built in a checkout that has then moved on is warned: kernels that are not there run several times slower.
    """
    name = f"mirage_kernels.{module}"
    if importlib.util.find_spec(name) is None:
        return None, f"not built: {why_missing}"
    _find_openmp()
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        return None, f"broken: the extension exists but does not load ({error})"
    if getattr(found, "interface", None) != INTERFACE:
        problem = "old: the extension was built from other sources than these, whose functions take other arguments"
        warnings.warn(f"{name}: {problem}. Build it again (make setup, or pip install of the checkout)", stacklevel=2)
        return None, f"{problem}; build it again"
    return found, ""


_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_emulated = os.environ.get("MIRAGE_CUDA_EMULATE") == "1"
native, _native_problem = _load(
    "_native", "the package was installed without a C++ compiler or with MIRAGE_SKIP_NATIVE=1"
)
if native is not None:
    instruction_set.settle(native)
cuda, _cuda_problem = (
    _load("_cuda_emulated", "the package was installed without MIRAGE_CUDA_EMULATED=1")
    if _emulated
    else _load("_cuda", "the package was installed where no nvcc and GPU were, or with MIRAGE_CUDA=off")
)


def triton_version() -> str | None:
    """Triton's, without importing it: ``"installed, version unknown"`` where no package tells, None without it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "installed, version unknown"


def _find_triton_problem() -> str:
    """Why Triton cannot be used; an unknown version is taken to be new enough."""
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) >= OLDEST_TRITON:
        return ""
    needed = ".".join(map(str, OLDEST_TRITON))
    return f"Triton {version} is too old: its compiler fails at some kernels, {needed} or later is needed"


_triton_problem = _find_triton_problem()


def _problem(implementation: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """Why `implementation` cannot run on such tensors on this machine, whatever the operator; empty when it can."""
    if implementation == "cpp":
        if native is None:
            return _native_problem
        if device_type != "cpu":
            return f"the C++ library runs on CPU tensors, not on {device_type}"
    elif implementation == "triton":
        if _triton_problem:
            return _triton_problem
        if device_type != "cuda" and not (_interpreted and device_type == "cpu"):
            return f"Triton kernels run on GPUs (on a CPU only under TRITON_INTERPRET=1), not on {device_type}"
        if dtype is not None and dtype not in _HALF_AND_SINGLE:
            return f"Triton kernels take float32, float16 and bfloat16, not {dtype}"
    elif implementation == "cuda":
        if cuda is None:
            return _cuda_problem
        if _emulated and device_type != "cpu":
            return f"MIRAGE_CUDA_EMULATE=1 runs the CUDA kernels on CPU tensors, not on {device_type}"
        if not _emulated and (device_type != "cuda" or torch.version.hip is not None):
            return f"the CUDA library runs on NVIDIA GPUs, not on {device_type}"
        if dtype is not None and dtype not in _HALF_AND_SINGLE:
            return f"CUDA kernels take float32, float16 and bfloat16, not {dtype}"
    return ""


def _automatic(device_type: str) -> str:
    """The first of `RANKED` that is there."""
    return next((name for name in RANKED.get(device_type, ()) if not _problem(name, device_type)), "torch")


def _from_environment() -> str | None:
    name = os.environ.get("MIRAGE_KERNELS") or None
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"MIRAGE_KERNELS: expected one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return name


# Plain module globals, so that torch.compile traces the choice and guards on it.
_forced: str | None = _from_environment()
_strict = False
_default = {device: _automatic(device) for device in ("cpu", "cuda")}
_last_used: dict[str, str] = {}
_declined: dict[str, tuple[Mapping[str, str], str, str, torch.dtype]] = {}
runnable = {
    device: {"composite", *(name for name in IMPLEMENTATIONS if not _problem(name, device))}
    for device in ("cpu", "cuda")
}
"""What an operator that is called by itself may name on each device."""


@contextlib.contextmanager
def use(implementation: str, *, strict: bool = False) -> Iterator[None]:
    """Force one implementation for every operator called inside the ``with`` block.

    Args:
        implementation: ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.
        strict: What happens where an operator has no kernels in it, or none for the tensors of a call. By default such
            an operator runs as it does by itself, so that a whole network can be run under the setting
            (:func:`last_used` and :func:`why_not` tell); with ``strict`` it raises.

    The setting is process-wide, like the flags in ``torch.backends``. A backward pass runs on the implementation that
    ran forward, also after the block has ended.

    Raises:
        ValueError: for another name.
        RuntimeError: at a call whose tensors the implementation cannot run on, or, with ``strict``, whose operator
            declines it, with the reason that :func:`why_not` would tell.
    """
    global _forced, _strict
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    previous = _forced, _strict
    _forced, _strict = implementation, strict
    try:
        yield
    finally:
        _forced, _strict = previous


@contextlib.contextmanager
def by_itself(implementation: str | None = None, *devices: str) -> Iterator[None]:
    """Inside, nothing is forced. With an `implementation` that is what calls run on by themselves on `devices` (on all
    by default): as on a machine that has no better. For tests and tools."""
    global _forced, _strict, _default
    previous = _forced, _strict, _default
    _forced, _strict = None, False
    if implementation is not None:
        _default = _default | dict.fromkeys(devices or _default, implementation)
    try:
        yield
    finally:
        _forced, _strict, _default = previous


def available() -> dict[str, str]:
    """For each implementation ``"yes"``, or the reason why it cannot run on this machine."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    result = {}
    for name in IMPLEMENTATIONS:
        problems = [_problem(name, device) for device in devices]
        result[name] = "yes" if "" in problems else problems[0 if name == "cpp" else -1]
    return result


def last_used(operator: str) -> str | None:
    """The implementation that the last call of `operator` ran on (its public name), or None before the first call."""
    return _last_used.get(operator)


def record(operator: str, implementation: str) -> None:
    _last_used[operator] = implementation


def may_run(implementation: str) -> bool:
    """Whether `implementation` is there and no other is forced."""
    return _forced in (None, implementation) and not _problem(implementation, "cpu")


def choose(operator: str, x: torch.Tensor, declined: Mapping[str, str] = NONE, otherwise: str = "torch") -> str:
    """The implementation for a call of `operator` whose main tensor is `x`.

    Args:
        declined: those that the operator lacks or that do not take its tensors, each with the reason. Where one of
            them is forced, which forces all operators, "cuda" leaves such a call to run as it does by itself, others
            to "torch".
        otherwise: "composite" for a stage, what runs in the place of "torch" on `COMPOSITE_ON`: a chain of steps with
            gradients of its own. Not where "torch" is forced, nor under transforms, which have no rules for its steps.

    Raises:
        RuntimeError: if :func:`use` or ``MIRAGE_KERNELS`` forces one that cannot run, with the reason.
    """
    within = transforms.problem()
    if _forced is None:
        chosen = "torch" if within else automatic(x, declined, operator)
        if chosen == "cpp":
            return chosen
    elif _forced == "torch":
        chosen = "torch"
    else:
        chosen = _enforced(operator, x, declined, within)
    if chosen == "torch":
        if not torch.compiler.is_compiling():
            record(operator, "torch")
            _declined[operator] = declined, within, x.device.type, x.dtype
        if not within and _forced != "torch" and x.device.type in COMPOSITE_ON:
            return otherwise
    return chosen


def _enforced(operator: str, x: torch.Tensor, declined: Mapping[str, str], within: str) -> str:
    """As :func:`choose`, where kernels are forced."""
    assert _forced is not None
    problem = within or _problem(_forced, x.device.type, x.dtype) or (declined.get(_forced, "") if _strict else "")
    if problem:
        raise RuntimeError(_refusal(operator, _forced, problem))
    if _forced not in declined:
        return _forced
    if not torch.compiler.is_compiling():
        _declined[operator] = declined, within, x.device.type, x.dtype
    return automatic(x, declined, operator) if _forced == "cuda" else "torch"


def _refusal(operator: str, implementation: str, problem: str) -> str:
    return f"{operator}: the implementation {implementation!r} was asked for but cannot run: {problem}"


def decline(operator: str, x: torch.Tensor, declined: Mapping[str, str]) -> None:
    """Keep for :func:`why_not` which kernels of a stage did not take a call that had been given to them, and why.

    Raises:
        RuntimeError: if one of them was asked for strictly.
    """
    if _strict and _forced is not None and _forced in declined:
        raise RuntimeError(_refusal(operator, _forced, declined[_forced]))
    if declined:
        _declined[operator] = declined, "", x.device.type, x.dtype
    else:
        _declined.pop(operator, None)


def automatic(x: torch.Tensor, declined: Mapping[str, str] = NONE, operator: str | None = None) -> str:
    """As :func:`choose` where nothing is forced: on a GPU what was measured to be faster there, or the default."""
    chosen = _default.get(x.device.type, "torch")
    if chosen in ON_GPUS:
        if operator is not None:
            chosen = _measured(operator, x, declined) or chosen
        if x.dtype not in _HALF_AND_SINGLE:
            return "torch"
    return "torch" if chosen in declined else chosen


def why_not(operator: str) -> dict[str, str]:
    """Why the last call of `operator` (its public name) that ran on "torch" or a composite did not run on the others:
    the reason for each implementation but "torch"; empty for those that nothing but :func:`use` kept away. Of a stage
    also where the kernels of one left a call to another's; its backward pass is asked for as ``<operator>_backward``.
    """
    if operator not in _declined:
        return {}
    declined, within, device_type, dtype = _declined[operator]
    return {name: declined.get(name) or within or _problem(name, device_type, dtype) for name in KERNELS}


def outlook(device_type: str, declined: Mapping[str, str] = NONE) -> tuple[str, dict[str, str]]:
    """What an operator runs on here by default on such a device, and why not on each of the other kernels, as far as
    that does not depend on the tensors. `declined` as in :func:`choose`."""
    runnable_here = [name for name in KERNELS if name not in declined and not _problem(name, device_type)]
    chosen = _default.get(device_type, "torch") if _forced is None else _forced
    if chosen not in runnable_here:
        chosen = "torch"
    rest = f"{chosen} is asked for" if _forced is not None else f"{chosen} comes first"
    others = (name for name in KERNELS if name != chosen)
    return chosen, {name: declined.get(name) or _problem(name, device_type) or rest for name in others}


def for_backward(operator: str, x: torch.Tensor, forward: str) -> str:
    """The implementation of an operator's backward pass, where `forward` ran forward: that, if it was forced."""
    if _forced is not None or forward not in ON_GPUS:
        return forward
    return _measured(f"{operator}_backward", x, NONE) or forward


def _measured(operator: str, x: torch.Tensor, declined: Mapping[str, str]) -> str | None:
    """What a file says was faster, where it can run."""
    found = tuning.choice(operator, x)
    if found is None or found in declined or _problem(found, x.device.type, x.dtype):
        return None
    return found
