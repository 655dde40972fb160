"""Triton's interpreter without two things that it does again and again.

To run a kernel it replaces the functions of its language by those of NumPy: it looks through all of their modules when
a launch begins, and once more at each call of a device function in it (`tl.sum` and `tl.cdiv` are such), where it finds
them replaced. That is a quarter of the time of our kernels. And when a launch ends it copies every argument's memory
back from the host, on the host onto itself: where a tensor has gaps of gigabytes, all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def spare() -> None:
    """From here on, in this process. Of an interpreter that is another than the one described nothing is changed."""
    from triton.runtime import interpreter

    executor = getattr(interpreter, "GridExecutor", None)
    if executor is None or hasattr(executor, "spared"):
        return
    executor.spared = True
    if hasattr(interpreter, "_patch_lang"):
        _replace_once_a_launch(interpreter, executor)
    if hasattr(executor, "_restore_args_dev"):
        _leave_what_is_on_the_host(executor)


def _replace_once_a_launch(interpreter: Any, executor: Any) -> None:
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


def _leave_what_is_on_the_host(executor: Any) -> None:
    restore = executor._restore_args_dev

    def restore_from_elsewhere(
        self: Any, given: Sequence[Any], used: Sequence[Any], named: dict[str, Any], used_named: dict[str, Any]
    ) -> None:
        before, after = [*given, *named.values()], [*used, *(used_named[name] for name in named)]
        if not all(map(_is_itself, before, after)):
            restore(self, given, used, named, used_named)

    executor._restore_args_dev = restore_from_elsewhere


def _is_itself(given: Any, used: Any) -> bool:
    """Whether there is nothing to be copied: what holds no tensor, or a tensor in the same memory."""
    if isinstance(given, Tensor):
        return given.untyped_storage().data_ptr() == used.untyped_storage().data_ptr()
    return not any((isinstance(given, tuple), hasattr(given, "data_ptr"), hasattr(given, "base")))  # holds tensors
