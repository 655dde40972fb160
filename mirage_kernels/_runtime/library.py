"""Registration of operators with PyTorch: one call gives schema, kernels, fake, autograd and autocast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mirage_kernels._runtime import dispatch, tuning
from mirage_kernels._runtime.implementations import KERNELS, ON_GPUS

NAMESPACE = "mirage_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


class Implementations(dict[str, ModuleType]):
    """The modules of an operator's implementations, ``<package>.<implementation>``, imported when first needed.

    Each has ``forward`` and ``backward``. Those of stages for GPUs also have ``forward_problem(x, *sizes)`` and
    ``backward_problem(x, *sizes)``: why their kernels do not take such a call, empty where they do. See :meth:`taking`.
    """

    def __init__(self, package: str) -> None:
        super().__init__()
        self._package = package

    def __missing__(self, name: str) -> ModuleType:
        if name not in KERNELS:
            raise ValueError(f"impl: expected 'cpp', 'triton' or 'cuda', got {name!r}")
        self[name] = import_module(f"{self._package}.{name}")
        return self[name]

    def taking(self, name: str, impl: str, x: Tensor, *sizes: Any) -> tuple[str, ModuleType | None]:
        """What runs a call of the stage's operator `name` that was given to `impl`.

        That itself where its kernels take it. Where those in CUDA C++ do not, it is what such an `x` runs on by itself;
        where Triton's do not, a chain of its operators, as everywhere that nothing else is left.

        Returns:
            The implementation and its module; None in the place of the module for the chain of operators of that
            implementation (see :mod:`mirage_kernels._composite`).

        Raises:
            RuntimeError: if an implementation was asked for strictly and its kernels decline, with the reason.
        """
        if impl == "composite":
            return impl, None
        predicate = "backward_problem" if name.endswith("_backward") else "forward_problem"
        declined: dict[str, str] = {}
        while impl not in ("composite", *declined):
            problem = getattr(self[impl], predicate)(x, *sizes) if impl in ON_GPUS else ""
            if not problem:
                break
            declined[impl] = problem
            if impl == "cuda":
                by_itself = dispatch.automatic(x)
                impl = "composite" if by_itself == "torch" else by_itself
        dispatch.decline(name, x, declined)
        return impl, None if impl == "composite" or impl in declined else self[impl]


UNREGISTERED: dict[str, Callable[..., Any]] = {}
"""What each operator runs, by its name, without the registration around it."""


def define(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: Sequence[int] | None = None,
    plain: Callable[..., Any] | None = None,
    differentiable: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Register ``mirage_kernels::<name>``.

    Args:
        name: Operator name. Names that end in ``_backward`` get no gradient: differentiating twice raises.
        schema: The part of the schema after the name, such as ``"(Tensor x, str impl) -> Tensor"``.
        kernel: Runs on CPU and CUDA tensors; receives the arguments of the schema.
        fake: Shapes and dtypes of the result.
        backward: ``backward(ctx, *grads)`` as in :func:`torch.library.register_autograd`; ``ctx.needs_input_grad`` has
            one more entry at its end.
        setup_context: The matching ``setup_context(ctx, inputs, output)``.
        autocast: Positions of the tensor arguments that autocast rounds to its dtype, as it does in the reference
            expression; None leaves the operator alone under autocast.
        plain: The same of PyTorch's operators: what programs that were recorded with this operator run on other
            devices and where `impl` cannot run.
        differentiable: Of an operator without a backward of its own: the same of operators that have one, which runs
            where a gradient is wanted.

    Returns:
        The operator, to be called directly.
    """
    UNREGISTERED[name] = kernel
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"{NAMESPACE}::{name}"
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel if plain is None else _where_it_runs(kernel, plain, key.lower()), key)
    torch.library.register_fake(qualified, fake, lib=_library)
    _register_transforms(name)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if plain is not None:
        _library.impl(name, plain, "CompositeExplicitAutograd")
    if differentiable is not None:
        _register_differentiable(name, operator, differentiable)
    elif backward is None or setup_context is None:
        _register_autograd(name, operator, _no_second_derivative(name), _keep_nothing)
    else:
        _register_autograd(name, operator, backward, setup_context)
    if autocast is not None:
        for device_type in ("cpu", "cuda"):
            _register_autocast(name, operator, device_type, tuple(autocast))
    return operator


class Pass(NamedTuple):
    """The forward or the backward pass of a stage: its kernel and its fake, as of :func:`define`; what it takes between
    x and the implementation, as in a schema; and how many tensors it returns."""

    kernel: Callable[..., Any]
    fake: Callable[..., Any]
    arguments: str
    results: int


def define_stage(
    name: str, forward: Pass, backward: Pass, setup_context: Callable[..., None], autograd: Callable[..., Any]
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Register a stage, ``mirage_kernels::<name>``, and its backward pass, which takes grad_y before x.

    Both take as `impl` also "composite", which runs in the place of an implementation that is not there; autocast
    rounds x.

    Returns:
        The two operators.
    """

    def registered(name: str, one: Pass, first: str, **options: Any) -> torch._ops.OpOverload:
        schema = f"({first}Tensor x, {one.arguments}, str impl) -> ({', '.join(['Tensor'] * one.results)})"
        return define(
            name, schema, one.kernel, one.fake, plain=lambda *args: one.kernel(*args[:-1], "composite"), **options
        )

    return (
        registered(name, forward, "", backward=autograd, setup_context=setup_context, autocast=(0,)),
        registered(f"{name}_backward", backward, "Tensor grad_y, "),
    )


def _register_autograd(
    name: str, operator: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """What `torch.library.register_autograd` does, without its search for arguments that were left at their defaults:
    no schema here has defaults, and with thirty arguments the search takes longer than the rest of a call."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *args, keyset = args
            with below_autograd():
                result = redispatch(keyset & after_autograd, *args)
            setup_context(ctx, args, result)
            if tuning.named and hasattr(ctx, "impl"):
                ctx.impl = dispatch.for_backward(name, args[0], ctx.impl)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = backward(ctx, *grads)
            return (*found, None) if isinstance(found, tuple) else (found, None)

    def with_autograd(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if is_grad_enabled() and any_requires_grad(*args):
            if level() is not None:
                raise NotImplementedError(_no_rule(name, "transforms of torch.func such as grad and vmap"))
            return apply(*args, keyset)
        with below_autograd():
            return redispatch(keyset & after_autograd, *args)

    is_grad_enabled = torch.is_grad_enabled
    any_requires_grad = getattr(torch._C, "_any_requires_grad", _any_requires_grad)  # from torch 2.7 on
    below_autograd, after_autograd = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    redispatch = operator.redispatch
    apply, level = Differentiable.apply, torch._C._functorch.maybe_current_level
    Differentiable.__name__ = Differentiable.__qualname__ = f"{name}_autograd"
    _library.impl(name, with_autograd, "Autograd", with_keyset=True)


def _where_it_runs(kernel: Callable[..., Any], plain: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`kernel` where the implementation that a call names, its last argument, is there; else `plain`: the name may come
    from a file that was recorded on another machine."""

    runnable = dispatch.runnable

    def run(*args: Any) -> Any:
        return kernel(*args) if args[-1] in runnable[device_type] else plain(*args)

    return run


def _register_differentiable(name: str, operator: torch._ops.OpOverload, differentiable: Callable[..., Any]) -> None:
    """Gradients of an operator with lists of tensors, by those of the operators that it stands for."""

    def with_autograd(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if wants_gradient(*_tensors(args)):
            return differentiable(*args)
        return _below_autograd(operator, keyset, args)

    _library.impl(name, with_autograd, "Autograd", with_keyset=True)


def _register_transforms(name: str) -> None:
    """The public functions take the reference expression under transforms; who calls the operator itself is told."""

    def batched(*args: Any) -> Any:
        raise NotImplementedError(_no_rule(name, "torch.func.vmap"))

    _library.impl(name, batched, "FuncTorchBatched")


def _no_rule(name: str, what: str) -> str:
    return (
        f"{NAMESPACE}::{name} has no rule for {what}: call the public function (mirage_kernels.*) there, or record "
        'the program under mirage_kernels.use("torch"), or of the network after mirage.fast.revert'
    )


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """Below autograd a dual tensor would lose its tangent without a word."""
    if any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(args)):
        raise NotImplementedError(_no_rule(name, "forward-mode derivatives"))


def _any_requires_grad(*args: Any) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Those among the arguments and in lists of them."""
    return [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]


def _below_autograd(operator: torch._ops.OpOverload, keyset: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} is a first derivative and has none of its own; for second derivatives run the "
            'operator under mirage_kernels.use("torch")'
        )

    return backward


def _register_autocast(name: str, operator: Any, device_type: str, positions: tuple[int, ...]) -> None:
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type]
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def with_autocast(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_round(a, dtype, device_type) if i in positions else a for i, a in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return operator(*cast, **kwargs)

    _library.impl(name, with_autocast, key)


def _round(value: Any, dtype: torch.dtype, device_type: str) -> Any:
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible and value.device.type == device_type else value


to_dlpack = torch._C._to_dlpack
"""A tensor as the native library takes it: a DLPack capsule, which carries its pointer, sizes and strides. No function
around it: a stage hands over thirty tensors."""


def run_or_explain(run: Callable[[], Tensor], check: Callable[[], None]) -> Tensor:
    """`run()`, where it fails for arguments that do not fit with the error of `check()`, which names the one.

    Kernels refuse tensors that do not fit. Only then is it worth the time to find out which.
    """
    if torch.compiler.is_compiling():
        check()
        return run()
    try:
        return run()
    except Exception:
        check()
        raise


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fake_like_x(x: Tensor, *_: Any) -> Tensor:
    """The fake of an operator of x and lists of weights, whose result is as x."""
    if not isinstance(x, FakeTensor) and x.device.type != "meta":  # a weight is, or this would not have been called
        raise ValueError(f"weights: expected tensors on {x.device} like x, got some on the meta device")
    return x.new_empty(x.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over elements of `dtype` are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are of float32 without tensor cores: TF32 is used only where PyTorch is set to it."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def native() -> Any:
    """The extension module; callers run only where dispatch has found it."""
    return dispatch.native


KEPT_FROM = 64 << 10
"""Bytes from which on a result of the C++ library is taken from its workspace (`kWorkspaceSmallest` there): of fresh
memory every page would be a fault, and malloc gives what is on top of its heap back to the system again and again."""
_DLPACK_TYPES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.float16: (2, 16), torch.bfloat16: (4, 16)}


def result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU for what a kernel of the C++ library is going to fill."""
    kept = dtype in _DLPACK_TYPES and math.prod(shape) * dtype.itemsize >= KEPT_FROM
    if not kept or torch.are_deterministic_algorithms_enabled():  # which fill fresh memory, so that errors show
        return torch.empty(shape, dtype=dtype)
    return torch._C._from_dlpack(native().result(list(shape), *_DLPACK_TYPES[dtype]))
