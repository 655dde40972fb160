"""Triton's interpreter without what it does again and again.

To run a kernel it replaces the functions of its language by those of NumPy: it looks through all of their modules when
a launch begins, and once more at each call of a device function in it (`tl.sum` and `tl.cdiv` are such), where it finds
them replaced. That is a quarter of the time of our kernels.
"""

from __future__ import annotations

import inspect
from typing import Any


def replace_once_a_launch() -> None:
    """From here on, in this process. Of an interpreter that is another than the one described nothing is changed."""
    from triton.runtime import interpreter

    executor = getattr(interpreter, "GridExecutor", None)
    if executor is None or not hasattr(interpreter, "_patch_lang") or hasattr(executor, "replaces_once"):
        return
    replace, launch, languages = interpreter._patch_lang, executor.__call__, (interpreter.tl, interpreter.tl.core)
    modules: dict[Any, frozenset[int]] = {}  # of the language that a function sees
    replaced: list[set[frozenset[int]]] = []  # in each launch that is running

    def replace_unless_done(function: Any) -> Any:
        if function not in modules:
            seen = (value for value in function.__globals__.values() if inspect.ismodule(value))
            modules[function] = frozenset(id(module) for module in seen if module in languages)
        if replaced and modules[function] in replaced[-1]:
            return None  # the scope of a device function's replacements, which nobody ends
        if replaced:
            replaced[-1].add(modules[function])
        return replace(function)

    def launch_with_its_own(self: Any, *arguments: Any, **options: Any) -> Any:
        replaced.append(set())
        try:
            return launch(self, *arguments, **options)
        finally:
            replaced.pop()

    interpreter._patch_lang, executor.__call__ = replace_unless_done, launch_with_its_own
    executor.replaces_once = True
