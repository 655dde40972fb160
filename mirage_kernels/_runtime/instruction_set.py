"""Which instruction set the C++ kernels run on: what ``MIRAGE_CPU_ISA`` names, or what was faster on this processor by
the file that ``MIRAGE_TUNING`` names, or the built-in choice.

The library settles on one when a kernel first runs; :func:`settle` tells it before.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from mirage_kernels._runtime import tuning
from mirage_kernels._runtime.processor import cpu_name

VARIABLE = "MIRAGE_CPU_ISA"
"""Read by the library itself, which chooses by itself where this names a set that cannot run."""


def settle(native: Any) -> None:
    """Tell a library that was just loaded what a file chooses, and the user what cannot be had.

    Raises:
        ValueError: ``MIRAGE_TUNING`` names a file that is not one of ``mirage tune``.
    """
    wish = os.environ.get(VARIABLE)
    if wish:
        if problem := native.cpu_isa_problem(wish):
            expected = "" if wish in tuning.INSTRUCTION_SETS else f" (expected {_listed(tuning.INSTRUCTION_SETS)})"
            _warn(native, f"{VARIABLE}: {wish!r} cannot be used, {problem}{expected}")
        return
    found = tuning.of_cpu()
    if found is None:
        return
    processor = cpu_name()
    if found.device != processor:
        _warn(native, f"{tuning.VARIABLE} was measured on {found.device}; it is not used on {processor}")
    elif problem := native.cpu_isa_problem(found.isa):
        _warn(native, f"{tuning.VARIABLE}: {found.isa!r} cannot be used, {problem}")
    else:
        native.prefer_cpu_isa(found.isa)


def _warn(native: Any, problem: str) -> None:
    warnings.warn(f"{problem}: {native.built_in_cpu_isa()} runs", stacklevel=3)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
