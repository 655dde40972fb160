"""What every operator has to show, written once: subclass :class:`OperatorTests` and name the operator of its
``cases.py``. How far from the truth a result may be: :mod:`mirage_kernels._runtime.accuracy`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mirage_kernels
from mirage_kernels._runtime import accuracy, dispatch
from mirage_kernels._runtime.accuracy import (
    ROUNDING_NOISE,
    allowed,
    cancellation,
    in_float64,
    random_like,
    relative_error,
    unavoidable,
)
from mirage_kernels._runtime.cases import Operator

HALF = (torch.float16, torch.bfloat16)
ON_GPU = torch.cuda.is_available()
ON_GPUS = ("triton", "cuda", "cuda_alone")
"""Implementations that are written for GPUs."""

ALONE = {"composite": "torch", "cuda_alone": "cuda"}
"""Of :func:`forced`: what runs by itself."""


def device_of(impl: str) -> str:
    return "cuda" if impl in ON_GPUS and ON_GPU else "cpu"


def named(impl: str) -> str:
    """As dispatch calls it."""
    return "cuda" if impl == "cuda_alone" else impl


def slowly(impl: str) -> bool:
    """Whether the kernels run one program after the other: in Triton's interpreter, or emulated on the host."""
    return impl in ON_GPUS and not ON_GPU


def implementations(names: tuple[str, ...] = ("cpp", "triton")) -> list[Any]:
    marks = dict.fromkeys(ON_GPUS, [pytest.mark.gpu] if ON_GPU else [])
    return [pytest.param(name, id=name, marks=marks.get(name, [])) for name in names]


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    if impl not in ON_GPUS:
        return (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if named(impl) == "cuda":
        return (torch.float32, torch.bfloat16, torch.float16)
    # Triton's interpreter truncates to bfloat16 instead of rounding.
    return (torch.float32, torch.bfloat16, torch.float16) if ON_GPU else (torch.float32, torch.float16)


def require(impl: str) -> None:
    if impl == "triton" and not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    reason = mirage_kernels.available().get(named(impl), "yes")
    if reason != "yes":
        pytest.skip(f"{impl}: {reason}")


@contextlib.contextmanager
def forced(impl: str) -> Iterator[None]:
    """`mirage_kernels.use(impl)`; for "composite" what a device without C++ and Triton does by itself, for "cuda_alone"
    what a GPU does where there is CUDA C++ and no Triton."""
    if impl not in ALONE:
        with mirage_kernels.use(impl):
            yield
        return
    with dispatch.by_itself(ALONE[impl]):
        yield


def each_of(implementations: Iterable[str]) -> Any:
    """A fixture for a module's ``impl``: every one of these that is there, in turn, forced while the test runs."""

    @pytest.fixture(params=implementations)
    def impl(request: pytest.FixtureRequest) -> Iterator[str]:
        require(request.param)
        with forced(request.param):
            yield request.param

    return impl


def evaluate(
    function: Callable[..., Tensor], tensors: list[Tensor], grad_output: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """[output, gradient of every tensor]; the gradient of the output is a fixed random tensor unless given."""
    return accuracy.evaluate(partial(function, **options), tensors, grad_output)


def assert_as_good_as_eager(
    dtype: torch.dtype, results: list[Tensor], eager: list[Tensor], truth: list[Tensor]
) -> None:
    """Of the output and gradients of inputs of `dtype`."""
    for i, (value, peer, exact) in enumerate(zip(results, eager, truth, strict=True)):
        assert value.shape == exact.shape and value.dtype == peer.dtype
        limit = allowed(dtype, value.dtype, exact, relative_error(peer, exact))
        assert relative_error(value, exact) <= limit, f"result {i}: {relative_error(value, exact)}, allowed {limit}"


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


# ---- layouts: the same values, other strides -----------------------------------------------------------------------


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_full([n + 3 for n in t.shape], float("nan"))
    view = wide[tuple(slice(1, 1 + n) for n in t.shape)]
    view.copy_(t)
    return view


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def _channel_chunk(t: Tensor) -> Tensor:
    return torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))], 1).chunk(3, 1)[1]


def _unaligned(t: Tensor) -> Tensor:
    flat = t.new_full((t.numel() + 1,), float("nan"))
    view = flat[1:].view(t.shape)
    view.copy_(t)
    return view


LAYOUTS = {
    "channels_last": _channels_last,
    "sliced": _sliced,
    "transposed": _transposed,
    "channel_chunk": _channel_chunk,
    "unaligned": _unaligned,
}


class _Recorder(TorchDispatchMode):
    """Keeps every call of a registered mirage_kernels operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mirage_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def operators(function: Callable[[], Any]) -> list[str]:
    """The names of the operators of this package that a function calls on the C++ library."""
    recorder = _Recorder()
    with forced("cpp"), recorder:
        function()
    return [operator._schema.name.split("::")[1] for operator, _ in recorder.calls]


class OperatorTests:
    """Subclass with `operator`; every test then runs for each implementation.

    `alias` names two arguments of which one tensor may serve both. `terms(inputs, grad_output)` gives, for results
    ("grad_<argument>") that are one sum over everything, its terms. `roundings`: of `accuracy.compare`. `keeps_layout`:
    the result is in channels_last where the first argument is.
    """

    operator: Operator
    alias: tuple[str, str] | None = None
    terms: Callable[[list[Tensor], Tensor], dict[str, Tensor]] | None = None
    roundings = 1
    keeps_layout = False

    @cached_property
    def implementations(self) -> tuple[str, ...]:
        return self.operator.implementations

    @cached_property
    def reference(self) -> Callable[..., Tensor]:
        """What results are compared with."""
        return self.operator.reference

    def extremes_floor(self, x: Tensor) -> float:
        """Error in epsilons that passes whatever eager's is, on planes so regular that eager may round nothing."""
        return 2

    def terms_of(self, inputs: list[Tensor], grad_output: Tensor) -> dict[str, Tensor]:
        """By name, in float64."""
        terms = type(self).terms
        return terms(in_float64(inputs), grad_output.double().cpu()) if terms else {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "impl" in metafunc.fixturenames:
            metafunc.parametrize("impl", implementations(self.implementations))
        if "shape" in metafunc.fixturenames:
            ids = ["x".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in self.operator.shapes]
            metafunc.parametrize("shape", self.operator.shapes, ids=ids)
        if "layout" in metafunc.fixturenames:
            metafunc.parametrize("layout", LAYOUTS)

    @pytest.fixture(autouse=True)
    def _implementation(self, request: pytest.FixtureRequest) -> Iterator[None]:
        if "impl" not in request.fixturenames:
            yield
            return
        impl = request.getfixturevalue("impl")
        require(impl)
        with forced(impl):
            yield

    @pytest.fixture(autouse=True)
    def _poisoned_allocations(self) -> Iterator[None]:
        """Fresh memory is NaN, so that an element which no kernel wrote is seen."""
        torch.use_deterministic_algorithms(True, warn_only=ON_GPU)  # where eager has operators that are not
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
        torch.use_deterministic_algorithms(False)

    def compare(self, inputs: list[Tensor], impl: str, grad_output: Tensor | None = None, known: Any = None) -> None:
        op = self.operator
        if grad_output is None:
            with torch.no_grad():
                grad_output = random_like(self.reference(*inputs))
        found = accuracy.compare(
            op.public,
            self.reference,
            inputs,
            grad_output,
            ["output", *(f"grad_{name}" for name in op.arguments)],
            terms=self.terms_of(inputs, grad_output),
            roundings=self.roundings,
            runs=1 if impl == "triton" and slowly(impl) else None,  # one may take half a minute
            known=known,
        )
        assert mirage_kernels.last_used(op.name) == named(impl)
        for result in found:
            assert result.passed, f"{op.name} {result}"

    def test_truth(self, impl: str, shape: Any) -> None:
        for dtype in dtypes_of(impl):
            self.compare(self.operator.inputs(shape, dtype, device_of(impl)), impl)

    def test_large(self, impl: str) -> None:
        """A plane of a million pixels (of a few where GPU kernels run on the host)."""
        shape = self.operator.shapes[0] if slowly(impl) else self.operator.large
        self.compare(self.operator.inputs(shape, torch.float32, device_of(impl), seed=1), impl)

    def test_gradcheck(self) -> None:
        require("cpp")
        op = self.operator
        with mirage_kernels.use("cpp"):
            inputs = op.inputs(op.shapes[0], torch.float64)
            assert torch.autograd.gradcheck(op.public, inputs, fast_mode=True)

    def test_second_derivative_is_refused(self, impl: str) -> None:
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        output = op.public(*inputs)
        (grad,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()

    def test_layout(self, impl: str, layout: str) -> None:
        """Every 4-D argument and the gradient of the output in another layout: nothing changes."""
        op = self.operator
        for dtype in dtypes_of(impl)[:1] + ((torch.bfloat16,) if impl != "triton" else ()):
            inputs = op.inputs(op.shapes[0], dtype, device_of(impl))
            with torch.no_grad():
                plain = op.public(*inputs)
                grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5)).to(plain)
            expected = evaluate(op.public, inputs, grad_output=grad)
            moved = [
                (LAYOUTS[layout](t.detach()) if t.dim() == 4 else t.detach()).requires_grad_() for t in inputs
            ]
            moved_grad = LAYOUTS[layout](grad) if grad.dim() == 4 else grad
            results = evaluate(op.public, moved, grad_output=moved_grad)
            terms = self.terms_of(inputs, grad)
            for name, value, peer in zip(("output", *op.arguments), results, expected, strict=True):
                cancels = cancellation(terms.get(f"grad_{name}"), peer.double().cpu())
                bound = 4 * torch.finfo(dtype).eps * cancels
                assert relative_error(value, peer) <= bound, f"{name} changes in layout {layout}"
                assert not value.isnan().any(), name
            keeps = self.keeps_layout and moved[0].is_contiguous(memory_format=torch.channels_last)
            assert results[0].is_contiguous(memory_format=torch.channels_last if keeps else torch.contiguous_format)

    def test_expanded(self, impl: str) -> None:
        """Arguments repeated over the batch, and the constant gradient that ``sum().backward()`` sends."""
        op = self.operator
        inputs = [
            (t[:1].detach().expand(t.shape) if t.dim() == 4 else t.detach()).requires_grad_()
            for t in op.inputs(op.shapes[0], torch.float32, device_of(impl))
        ]
        grad = inputs[0].new_ones(1).expand(op.public(*inputs).shape)
        self.compare(inputs, impl, grad_output=grad)

    def test_inputs_unchanged(self, impl: str) -> None:
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        output = op.public(*inputs)
        grad = torch.randn_like(output)
        everything = [*inputs, grad]
        copies, versions = [t.detach().clone() for t in everything], [t._version for t in everything]
        op_output = op.public(*inputs)
        results = [op_output, *torch.autograd.grad(op_output, inputs, grad)]
        for tensor, copy, version in zip(everything, copies, versions, strict=True):
            assert torch.equal(tensor, copy) and tensor._version == version
        memory = {t.untyped_storage().data_ptr() for t in everything}
        assert not memory & {t.untyped_storage().data_ptr() for t in results}, "a result shares memory with an input"

    def test_deterministic(self, impl: str) -> None:
        """Two runs give the same bits, on any number of threads. What runs one program after the other has none: see
        test_cuda for the order of its threads."""
        op = self.operator
        inputs = op.inputs(op.shapes[0 if slowly(impl) else -1], torch.float32, device_of(impl))
        threads = torch.get_num_threads()
        first = evaluate(op.public, inputs)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            second = evaluate(op.public, inputs)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_extremes(self, impl: str) -> None:
        """Zero and constant planes, and values up to 200."""
        op = self.operator
        for dtype in dtypes_of(impl)[:1] + ((torch.bfloat16,) if impl != "triton" else ()):
            for change in (lambda t: t * 0, lambda t: t * 0 + 3, lambda t: t * (200 / t.abs().max())):
                base = op.inputs(op.shapes[0], dtype, device_of(impl))
                inputs = [change(base[0].detach()).requires_grad_(), *base[1:]]
                with torch.no_grad():
                    grad = random_like(self.reference(*inputs))
                results = evaluate(op.public, inputs, grad_output=grad)
                eager = evaluate(self.reference, inputs, grad_output=grad)
                truth = evaluate(self.reference, in_float64(inputs), grad_output=grad.double().cpu())
                for value, peer, exact in zip(results, eager, truth, strict=True):
                    scale = max(exact.double().norm().item(), 1.0)
                    error, peers = ((v.double().cpu() - exact).norm().item() / scale for v in (value, peer))
                    assert value.isfinite().all()
                    assert error <= max(2 * peers, self.extremes_floor(inputs[0]) * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, impl: str, poison: float) -> None:
        """What is not finite in eager's output is not finite here, and the rest is unharmed."""
        op = self.operator
        inputs = [t.detach() for t in op.inputs(op.shapes[0], torch.float32, device_of(impl))]
        inputs[0].view(-1)[inputs[0].numel() // 2] = poison
        with torch.no_grad():
            value, peer = op.public(*inputs), self.reference(*inputs)
        assert torch.equal(value.isnan(), peer.isnan())
        assert torch.equal(value.isinf(), peer.isinf())
        healthy = peer.isfinite()
        assert torch.allclose(value[healthy], peer[healthy], rtol=1e-4, atol=1e-5)

    def test_empty_batch(self, impl: str) -> None:
        op = self.operator
        inputs = op.inputs(op.empty, torch.float32, device_of(impl))
        results, expected = evaluate(op.public, inputs), evaluate(self.reference, inputs)
        for value, peer in zip(results, expected, strict=True):
            assert value.shape == peer.shape
            assert torch.equal(value, torch.zeros_like(value)), "gradients summed over nothing are zero"

    def test_registration(self, impl: str) -> None:
        """Schema, fake, autograd and AOT dispatch of every registered operator that forward and backward reach."""
        torch.use_deterministic_algorithms(False)
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        with _Recorder() as recorder:
            evaluate(op.public, inputs)
        assert len(recorder.calls) >= 2
        for func, args in recorder.calls:
            leaves = tuple(
                a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
            )
            backward = func._schema.name.endswith("_backward")
            checks = ["test_schema", "test_faketensor"]
            # Autograd and AOT dispatch are those of the operator, whatever implementation runs.
            if not backward and not (slowly(impl) and mirage_kernels.available()["cpp"] == "yes"):
                checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
            torch.library.opcheck(func, leaves, test_utils=checks)

    def test_flops(self, impl: str) -> None:
        """Forward: as many as PyTorch counts in the reference, also by `cases.py`. Backward: both factors of each
        product (PyTorch counts the weights' gradients of a grouped convolution once for each group)."""
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        with FlopCounterMode(display=False) as counter:
            op.reference(*inputs)
        expected = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            output = op.public(*inputs)
            assert counter.get_total_flops() == expected == 2 * op.macs(op.shapes[0])
            output.sum().backward()
        assert counter.get_total_flops() == 3 * expected == 2 * op.macs(op.shapes[0], both=True)

    def test_compile(self, impl: str) -> None:
        """torch.compile(fullgraph=True) reaches the kernels and gives their gradients, aliased arguments included."""
        torch.use_deterministic_algorithms(False)
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        if self.alias is not None:
            first, second = (op.arguments.index(name) for name in self.alias)
            inputs[second] = inputs[first]
        distinct = list(dict.fromkeys(inputs))
        positions = [next(i for i, d in enumerate(distinct) if d is t) for t in inputs]

        def function(*tensors: Tensor) -> Tensor:
            return op.public(*(tensors[i] for i in positions)) * 2

        expected = evaluate(function, distinct)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = evaluate(compiled, distinct)
        for value, peer in zip(results, expected, strict=True):
            assert torch.equal(value, peer)

    def test_autocast(self) -> None:
        """Under autocast: the dtype of the reference, and no further from the truth than it."""
        require("cpp")
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            with mirage_kernels.use("cpp"):
                value = op.public(*inputs)
            peer = self.reference(*inputs)
        exact = self.reference(*in_float64(inputs))
        assert value.dtype == peer.dtype
        allowed = max(ROUNDING_NOISE * relative_error(peer, exact), unavoidable(exact, value.dtype))
        assert relative_error(value, exact) <= allowed
        with torch.autocast("cpu", torch.bfloat16), mirage_kernels.use("cpp"):
            gradients = torch.autograd.grad(op.public(*inputs).float().sum(), inputs)
        assert all(g.dtype == t.dtype for g, t in zip(gradients, inputs, strict=True))


@cache
def large_problem(operator: Operator, device: str) -> tuple[list[Tensor], Tensor, tuple[list[Tensor], list[Tensor]]]:
    """Inputs, gradient of the output, and what the reference makes of them: which all implementations share."""
    inputs = operator.inputs(operator.large, torch.float32, device, seed=1)
    with torch.no_grad():
        grad_output = random_like(operator.reference(*inputs))
    exact = evaluate(operator.reference, in_float64(inputs), grad_output.double().cpu())
    return inputs, grad_output, (evaluate(operator.reference, inputs, grad_output), exact)


class StageTests(OperatorTests):
    """Of a whole stage. Triton's kernels are tested in test_triton_stages: they take minutes in the interpreter.

    `wide` are shapes besides, with widths and channels at and beyond the ends of blocks and vectors.
    """

    implementations = ("cpp", "composite", "cuda_alone", *(("triton",) if ON_GPU else ()))
    wide: tuple[tuple[int, ...], ...] = ()
    roundings = 9
    keeps_layout = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "wide" in metafunc.fixturenames:
            metafunc.parametrize("wide", self.wide, ids=str)
            names = [name for name in ("cpp", "composite", "cuda_alone") if name in self.implementations]
            metafunc.parametrize("on_cpu", names)

    def test_wide(self, on_cpu: str, wide: tuple[int, ...]) -> None:
        require(on_cpu)
        with forced(on_cpu):
            for dtype in (torch.float32, torch.bfloat16):
                self.compare(self.operator.inputs(wide, dtype), on_cpu)

    def test_large(self, impl: str) -> None:
        if slowly(impl):
            return super().test_large(impl)
        inputs, grad_output, known = large_problem(self.operator, device_of(impl))
        self.compare(inputs, impl, grad_output, known)

    def test_deterministic(self, impl: str) -> None:
        """The same bits every time; on the C++ library also on any number of threads, unlike PyTorch's convolutions."""
        if impl == "cpp":
            return super().test_deterministic(impl)
        inputs = self.operator.inputs(self.operator.shapes[0 if slowly(impl) else -1], torch.float32, device_of(impl))
        runs = [evaluate(self.operator.public, inputs) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_autocast(self) -> None:
        """The residual stream has the dtype of autocast; weights keep their own, and so do their gradients."""
        require("cpp")
        op = self.operator
        x, *weights = op.inputs(op.shapes[0], torch.float32)
        tensors = [x.detach().to(torch.bfloat16).requires_grad_(), *weights]
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        truth = evaluate(self.reference, in_float64(tensors), grad_output=grad.double())
        with torch.autocast("cpu", torch.bfloat16):
            eager = evaluate(self.reference, tensors, grad_output=grad)
        for impl in ("cpp", "composite"):
            with forced(impl), torch.autocast("cpu", torch.bfloat16):
                values = evaluate(op.public, tensors, grad_output=grad)
                assert op.public(x, *weights).dtype == torch.bfloat16
            for name, value, peer, expected in zip(("output", *op.arguments), values, eager, truth, strict=True):
                assert value.dtype == peer.dtype
                limit = max(ROUNDING_NOISE * relative_error(peer, expected), unavoidable(expected, value.dtype))
                assert relative_error(value, expected) <= limit, name
