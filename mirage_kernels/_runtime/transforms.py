"""Who else works on a call: what records or rewrites it through PyTorch's dispatcher.

A trace, a dispatch mode or a transform of `torch.func` sees the operators that a function calls, not the memory that it
makes beside them: where one is at work, nothing may be written past the dispatcher (:func:`nobody_watches`). And
transforms that need a rule for each operator find one for PyTorch's own only (:func:`problem`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_compiler = torch.compiler
_tracing = torch._C._get_tracing_state
_level = torch._C._functorch.maybe_current_level
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
Function = TypeVar("Function", bound=Callable[..., Any])


def _others(*names: str) -> int:
    """The bits of all dispatch keys but these."""
    keys = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return ~reduce(operator.or_, keys).raw_repr()


_NOT_OF_A_THREAD = _others("BackendSelect", "ADInplaceOrView")
_NOT_OF_A_CPU_TENSOR = _others("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


def nobody_watches(*tensors: Tensor) -> bool:
    """Whether what is done with these CPU tensors is between the caller and the kernels alone.

    Asked of the dispatcher itself: a trace (`torch.jit.trace`, `make_fx`), a transform (`vmap`, `functionalize`), a
    mode (`FakeTensorMode`, a user's own) or a wrapped tensor shows in a dispatch key that a plain call has not. So do
    those that nobody has thought of yet.
    """
    if forward_ad._current_level >= 0 or torch._C._len_torch_function_stack() > 0:
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() & _NOT_OF_A_THREAD:
        return False
    if not all(type(t) in PLAIN_TYPES for t in tensors):
        return False
    return not any(torch._C._dispatch_keys(t).raw_repr() & _NOT_OF_A_CPU_TENSOR for t in tensors)


def constant_where_compiled(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, without the import of the whole compiler that calling it brings: more
    than a second of every process, most of which compile nothing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_where_compiled
def problem() -> str:
    """Why only PyTorch's own operators can serve a call, or nothing: transforms that need a rule for each operator.

    `torch.compile` takes what holds where it compiles, as it does with the transforms themselves.
    """
    if _level() is not None:
        return "inside a transform of torch.func (vmap, grad, jvp, ...) only PyTorch's operators have rules"
    if forward_ad._current_level >= 0:
        return "only PyTorch's operators have forward-mode derivatives"
    if (_compiler._is_compiling_flag or _tracing() is not None) and torch.onnx.is_in_onnx_export():
        return "ONNX has PyTorch's operators only"
    return ""
