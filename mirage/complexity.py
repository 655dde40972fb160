"""Parameters, multiply-adds and memory of a model: the columns of the paper's Table 6.

The paper's Memory column is the peak of allocated memory over one forward pass in training mode with autograd on,
parameters included. On CUDA that is ``torch.cuda.max_memory_allocated``. Without a GPU :class:`MemoryTracker` counts
the same bytes: every new storage, rounded up to the 512 bytes of CUDA's caching allocator, until that storage dies.
Under ``FakeTensorMode`` the same tracker gives the figure without allocating or computing anything.

FLOPs in that table are multiply-adds: half of what ``torch.utils.flop_counter.FlopCounterMode`` counts.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

__all__ = ["Complexity", "MemoryTracker", "measure", "measure_step"]

ALLOCATION_QUANTUM = 512
"""Bytes: CUDA's caching allocator hands out multiples of this."""

WITHOUT_PRODUCTS = frozenset({"mirage_kernels::channel_layer_norm", "mirage_kernels::tri_branch_fusion"})
"""Custom operators that PyTorch would count no FLOPs for either: they replace elementwise expressions and means."""

VALUE_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
"""What fake tensors raise where sizes or branches depend on the values that they do not have."""

MEMORY_METHODS = ("auto", "tracker", "cuda", "fake")
MIB = 1 << 20

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Complexity:
    """What one pass costs.

    Attributes:
        parameters: number of learnable scalars.
        macs: multiply-adds of one forward pass (never of the backward pass).
        peak_memory_bytes: the highest number of bytes allocated at once, parameters, buffers and input included.
        input_size: shape of the input, ``(B, C, H, W)``.
        device: type of the device that ran, ``"cpu"`` or ``"cuda"``.
        memory_method: ``"tracker"``, ``"cuda"`` or ``"fake"``, see :func:`measure`.
        scope: ``"forward"``, or ``"step"`` for forward, loss and backward.
        uncounted_operators: custom operators that ran without a FLOP formula; ``macs`` is too low where there are any.
    """

    parameters: int
    macs: int
    peak_memory_bytes: int
    input_size: tuple[int, ...]
    device: str
    memory_method: str
    scope: str
    uncounted_operators: tuple[str, ...] = ()

    @property
    def gmacs(self) -> float:
        """Multiply-adds in units of 1e9."""
        return self.macs / 1e9

    @property
    def peak_memory_mib(self) -> float:
        """Peak memory in MiB (2**20 bytes)."""
        return self.peak_memory_bytes / MIB

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storages created while it is active, and their peak.

    Each storage counts once however many tensors view it, rounded up to a multiple of 512 bytes, from the operator that
    returns it until the storage is freed. Storages that existed before are counted where :meth:`add` names them. Custom
    operators count like any other; on real tensors the scratch memory they allocate through PyTorch while they run is
    seen too, which a fake tensor cannot show. Memory a library takes from the system allocator by itself is not seen.

    Attributes:
        current: bytes alive now.
        peak: highest value ``current`` had.
        custom_operators: the overloads outside PyTorch's own namespaces that ran.
    """

    OWN_NAMESPACES = frozenset({"aten", "prim", "prims", "profiler", "mkldnn", "inductor", "c10d", "debugprims"})

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.custom_operators: set[Any] = set()
        self._live: dict[int, tuple[weakref.ref, int]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` as allocated from now on; those already counted are left alone."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            size = math.ceil(storage.nbytes() / ALLOCATION_QUANTUM) * ALLOCATION_QUANTUM
            self._live[key] = (weakref.ref(storage, partial(self._drop, key)), size)
            self.current += size
        self.peak = max(self.peak, self.current)

    def _drop(self, key: int, _: weakref.ref) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self.current -= entry[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace in self.OWN_NAMESPACES:
            out = func(*args, **kwargs)
        else:
            self.custom_operators.add(func)
            out = self._run_custom(func, args, kwargs)
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def _run_custom(self, func, args, kwargs):
        """Run a custom operator with the tracker still watching what its kernel allocates."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not inputs or any(type(leaf) not in (Tensor, nn.Parameter) or leaf.device.type != "cpu" for leaf in inputs):
            return func(*args, **kwargs)
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)


def measure(
    model: nn.Module,
    input_size: tuple[int, int, int, int] = (1, 3, 224, 224),
    *,
    x: Tensor | None = None,
    memory: str = "auto",
) -> Complexity:
    """Parameters, multiply-adds and peak memory of one forward pass as the released code trains: training mode,
    autograd on, with the SPD head.

    A model whose ``forward`` takes ``return_spd`` and that has the head gets ``return_spd=True``; any other is called
    with the input alone and may return the restored image or a tuple that starts with it. Parameters, gradients,
    buffers (the statistics of BatchNorm included), training flags and random state are afterwards as they were. Paper:
    Table 6.

    Args:
        model: the network; its own device is where the pass runs.
        input_size: ``(B, C, H, W)`` of the random input.
        x: a real input instead, of any floating dtype the model takes; moved to the model's device.
        memory: ``"tracker"`` runs the pass under :class:`MemoryTracker`; ``"cuda"`` runs it, after one to warm up, and
            asks the CUDA allocator; ``"fake"`` estimates without allocating or computing; ``"auto"`` is ``"cuda"`` for
            a model on a CUDA device and ``"tracker"`` elsewhere.

    Raises:
        ValueError: ``memory`` is unknown, ``"cuda"`` for a model that is not on a CUDA device, or ``"fake"`` for one in
            which sizes depend on values.
    """
    return _measure(model, input_size, x, memory, loss=None)


def measure_step(
    model: nn.Module,
    input_size: tuple[int, int, int, int] = (1, 3, 128, 128),
    *,
    x: Tensor | None = None,
    loss: Loss = nn.functional.l1_loss,
    memory: str = "auto",
) -> Complexity:
    """Like :func:`measure`, but memory is the peak of a training step: forward, loss and backward into fresh gradients.

    Args:
        loss: ``loss(restored, target)`` -> scalar; the target is a tensor of the input's shape and counts as allocated.

    The other arguments, the errors and what is left unchanged are those of :func:`measure`; ``macs`` stays that of the
    forward pass. The optimiser's own state is not part of a step here.
    """
    return _measure(model, input_size, x, memory, loss=loss)


def _measure(model: nn.Module, input_size, x: Tensor | None, memory: str, loss: Loss | None) -> Complexity:
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.get_default_dtype()
    method = _resolve_method(memory, device)
    if x is None:
        x = torch.rand(tuple(input_size), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    else:
        x = x.detach().to(device)
    with _unchanged(model):
        macs, uncounted = _count_macs(model, x)
        peak = {"tracker": _peak_tracked, "cuda": _peak_cuda, "fake": _peak_fake}[method](model, x, loss)
    return Complexity(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=macs,
        peak_memory_bytes=peak,
        input_size=tuple(x.shape),
        device=device.type,
        memory_method=method,
        scope="forward" if loss is None else "step",
        uncounted_operators=uncounted,
    )


def _resolve_method(memory: str, device: torch.device) -> str:
    if memory not in MEMORY_METHODS:
        raise ValueError(f"memory: expected one of {', '.join(MEMORY_METHODS)}, got {memory!r}")
    if memory == "auto":
        return "cuda" if device.type == "cuda" else "tracker"
    if memory == "cuda" and device.type != "cuda":
        raise ValueError(f"memory: 'cuda' needs a model on a CUDA device, got one on {device}")
    return memory


def run_forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    """One training forward as released: ``(restored, everything the model returned)``."""
    out = model(x, return_spd=True) if _has_spd_head(model) else model(x)
    return (out[0] if isinstance(out, tuple | list) else out), out


def _has_spd_head(model: nn.Module) -> bool:
    """Whether a forward with ``return_spd=True`` can be had: MIRAGE built with ``spd=False`` refuses it, while a model
    of another author tells by the argument alone."""
    built_with = getattr(model, "config", {})
    without = isinstance(built_with, Mapping) and built_with.get("spd") is False
    return "return_spd" in inspect.signature(model.forward).parameters and not without


def _pass(model: nn.Module, x: Tensor, target: Tensor | None, loss: Loss | None) -> None:
    restored, out = run_forward(model, x)
    if loss is not None and target is not None:
        loss(restored, target).backward()
    del out


def _target(x: Tensor, loss: Loss | None) -> Tensor | None:
    return None if loss is None else torch.zeros_like(x)


def _peak_tracked(model: nn.Module, x: Tensor, loss: Loss | None) -> int:
    target = _target(x, loss)
    tracker = MemoryTracker()
    tracker.add([*model.parameters(), *model.buffers(), x, *([] if target is None else [target])])
    with tracker:
        _pass(model, x, target, loss)
    return tracker.peak


def _peak_fake(model: nn.Module, x: Tensor, loss: Loss | None) -> int:
    try:
        with _faked(model, x) as (fake, fake_x):
            return _peak_tracked(fake, fake_x, loss)
    except VALUE_DEPENDENT as error:
        name = type(model).__name__
        raise ValueError(f"memory: 'fake' has no values, on which depends what {name} runs ({error.func})") from error


def _peak_cuda(model: nn.Module, x: Tensor, loss: Loss | None) -> int:
    target = _target(x, loss)
    _pass(model, x, target, loss)  # library handles and workspaces stay allocated for good: not part of a pass
    model.zero_grad(set_to_none=True)
    own = MemoryTracker()
    own.add([*model.parameters(), *model.buffers(), x, *([] if target is None else [target])])
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    _pass(model, x, target, loss)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before + own.current


def _count_macs(model: nn.Module, x: Tensor) -> tuple[int, tuple[str, ...]]:
    """Multiply-adds of one forward, and the custom operators without a FLOP formula: on fake tensors, or on real ones
    where what the model runs depends on their values."""
    try:
        with _faked(model, x) as (fake, fake_x):
            return _counted(fake, fake_x)
    except VALUE_DEPENDENT:
        with torch.no_grad():
            return _counted(model, x)


def _counted(model: nn.Module, x: Tensor) -> tuple[int, tuple[str, ...]]:
    tracker = MemoryTracker()
    with tracker, FlopCounterMode(display=False) as counter:
        run_forward(model, x)
    without = (op for op in tracker.custom_operators if op._overloadpacket not in flop_registry)
    uncounted = {str(op) for op in without if op._schema.name not in WITHOUT_PRODUCTS}
    return counter.get_total_flops() // 2, tuple(sorted(uncounted))


class _Functional(nn.Module):
    """A model run with other tensors in the place of its parameters and buffers."""

    _model: nn.Module
    _tensors: dict[str, Tensor]

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_tensors", dict(tensors))
        self.forward: Callable[..., Any] = self._make_forward(_has_spd_head(model))

    def _make_forward(self, takes_spd: bool):
        def call(*args, **kwargs):
            return torch.func.functional_call(self._model, self._tensors, args, kwargs, strict=True)

        if takes_spd:
            return lambda x, return_spd=False: call(x, return_spd=return_spd)
        return lambda x: call(x)

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:  # type: ignore[override]  # not Parameters
        return iter(self._tensors.values())


@contextmanager
def _faked(model: nn.Module, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """The model and its input as fake tensors: shapes and storages without memory behind them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: mode.from_tensor(tensor) for name, tensor in named}
    with mode:
        yield _Functional(model, tensors), mode.from_tensor(x)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Training mode and autograd inside; buffers, gradients, training flags and random state restored after."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(d.index for d in devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for parameter, _ in grads:
            parameter.grad = None
        model.train()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            for parameter, grad in grads:
                parameter.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
