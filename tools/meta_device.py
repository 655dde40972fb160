"""The registered operators in Triton on tensors without memory: nothing is launched, a hook is told what would be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_kernels._runtime import dispatch, library
from mirage_kernels._triton import launch


class Operators(TorchDispatchMode):
    """Runs what a registered operator runs on a GPU. By itself PyTorch would run its fake on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mirage_kernels":
            with self:
                return library.UNREGISTERED[func._schema.name.split("::")[1]](*args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def launching(hook: Callable[..., None]) -> Iterator[None]:
    """Triton is what runs on the meta device, and `hook` is called instead of launching: see `launch.launch_hook`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.by_itself("triton", "meta"))
        stack.enter_context(mock.patch.object(launch, "launch_hook", hook))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *device: False))  # meta has none
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *device, **enabled: contextlib.nullcontext()))
        yield
