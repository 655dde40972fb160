"""What every operator has to show, written once: subclass :class:`OperatorTests` and name the operator.

Truth is the reference in float64. A float32 result may be at most twice as far from it as eager PyTorch in float32; a
16-bit result no further than eager in the same dtype. A result as good as rounding the truth always passes.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mirage_kernels
from mirage_kernels._runtime import dispatch

HALF = (torch.float16, torch.bfloat16)
ON_GPU = torch.cuda.is_available()
ON_GPUS = ("triton", "cuda", "cuda_alone")
"""Implementations that are written for GPUs."""

ALONE = {"composite": "torch", "cuda_alone": "cuda"}
"""Of :func:`forced`: what runs by itself."""

# How far from the truth a result may be, in errors of eager at the same dtype: (operator, dtype, tensor) overrides
# dtype. Tensors are "output" or "grad_<argument>".
TOLERANCE: dict[Any, float] = {torch.float32: 2.0, torch.float16: 1.0, torch.bfloat16: 1.0}
# In float64 eager is the truth itself; this relative error leaves room for another order of summation only.
FLOAT64 = 1e-14
# Two correctly summed results of a 16-bit tensor round a few elements differently; this much is not an error.
ROUNDING_NOISE = 1.05


@dataclass(frozen=True)
class Operator:
    """An operator under test.

    `make(shape, generator)` returns its tensor arguments in float64, in order; `arguments` names them; `shapes` are
    keys for `make`, the first being small and typical; `alias` names two arguments of which one tensor may serve both.
    `terms(inputs, grad_output)` gives, for results ("grad_<argument>") that are one sum over everything, its terms:
    such a sum may cancel, and then the rounding of its terms is no error of the implementation. After a long chain of
    roundings the error of a few numbers is a matter of luck: where one run is past eager's, the errors are taken from
    `roundings` equivalent inputs (perturbed in their last bit), eager's as the largest, the operator's as the median;
    in Triton's interpreter, where a run may take half a minute, as that of the first. `keeps_layout`: the result is in
    channels_last where the first argument is.
    """

    name: str
    public: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make: Callable[[Any, torch.Generator], tuple[Tensor, ...]]
    arguments: tuple[str, ...]
    shapes: tuple[Any, ...]
    empty: Any
    large: Any
    alias: tuple[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    terms: Callable[[list[Tensor], Tensor], dict[str, Tensor]] | None = None
    roundings: int = 1
    keeps_layout: bool = False

    def inputs(self, shape: Any, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [t.to(dtype=dtype, device=device).requires_grad_() for t in self.make(shape, generator)]


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
    defaults = dispatch._default
    dispatch._default = dict.fromkeys(defaults, ALONE[impl])
    try:
        yield
    finally:
        dispatch._default = defaults


def random_like(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)


def evaluate(
    function: Callable[..., Tensor], tensors: list[Tensor], grad_output: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """[output, gradient of every tensor]; the gradient of the output is a fixed random tensor unless given."""
    output = function(*tensors, **options)
    if grad_output is None:
        grad_output = random_like(output)
    return [output, *torch.autograd.grad(output, tensors, grad_output)]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth (over 1 where the truth is zero)."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    norm = truth.norm().item()
    return ((value - truth).norm() / (norm or 1.0)).item()


def unavoidable(truth: Tensor, dtype: torch.dtype) -> float:
    """The error of rounding the truth; in float32, where eager may be lucky on a handful of sums, one epsilon."""
    rounded = ROUNDING_NOISE * relative_error(truth.to(dtype), truth)
    return max(rounded, torch.finfo(dtype).eps) if dtype == torch.float32 else rounded


def cancellation(terms: Tensor | None, exact: Tensor) -> float:
    """How much larger the terms of a sum are than the sum, at least 1."""
    return 1.0 if terms is None else max(1.0, (terms.norm() / exact.norm()).item())


def assert_as_good_as_eager(
    operator: Operator,
    dtype: torch.dtype,
    results: list[Tensor],
    eager: list[Tensor],
    truth: list[Tensor],
    terms: dict[str, Tensor] | None = None,
    errors: list[float] | None = None,
    eager_errors: list[float] | None = None,
) -> None:
    names = ["output", *(f"grad_{name}" for name in operator.arguments)]
    terms = terms or {}
    errors = errors or list(map(relative_error, results, truth))
    eager_errors = eager_errors or list(map(relative_error, eager, truth))
    rows = zip(names, results, eager, truth, errors, eager_errors, strict=True)
    for name, value, peer, exact, error, peer_error in rows:
        assert value.shape == exact.shape, f"{name}: shape {list(value.shape)} instead of {list(exact.shape)}"
        assert value.dtype == peer.dtype, f"{name}: {value.dtype} where the reference gives {peer.dtype}"
        # Independent roundings of the terms add up to the root of the sum of their squares: eager's expected error.
        cancels = cancellation(terms.get(name), exact)
        if dtype == torch.float64:
            allowed = FLOAT64 * cancels
        else:
            factor = TOLERANCE.get((operator.name, dtype, name), TOLERANCE[dtype])
            floor = unavoidable(exact, value.dtype)
            if name in terms and dtype == torch.float32:
                floor *= factor * cancels
            allowed = max(factor * ROUNDING_NOISE * peer_error, floor)
        assert error <= allowed, f"{operator.name} {name}: relative error {error:.3e}, allowed {allowed:.3e}"


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


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
    """Subclass with `operator = Operator(...)`; every test then runs for each implementation."""

    operator: Operator
    implementations: tuple[str, ...] = ("cpp", "triton")

    def extremes_floor(self, x: Tensor) -> float:
        """Error in epsilons that passes whatever eager's is, on planes so regular that eager may round nothing."""
        return 2

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
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
        torch.use_deterministic_algorithms(False)

    def run(self, function: Callable[..., Tensor], tensors: list[Tensor], **more: Any) -> list[Tensor]:
        return evaluate(function, tensors, **more, **self.operator.options)

    def compare(self, inputs: list[Tensor], impl: str, grad_output: Tensor | None = None) -> None:
        op, dtype = self.operator, inputs[0].dtype
        if grad_output is None:
            with torch.no_grad():
                grad_output = random_like(op.reference(*inputs, **op.options))
        results = self.run(op.public, inputs, grad_output=grad_output)
        eager = self.run(op.reference, inputs, grad_output=grad_output)
        truth = self.run(op.reference, in_float64(inputs), grad_output=grad_output.double().cpu())
        assert mirage_kernels.last_used(op.name) == named(impl)
        terms = op.terms(in_float64(inputs), grad_output.double().cpu()) if op.terms else None
        errors = [list(map(relative_error, results, truth))], [list(map(relative_error, eager, truth))]
        try:
            assert_as_good_as_eager(op, dtype, results, eager, truth, terms, *(e[0] for e in errors))
        except AssertionError:
            if op.roundings == 1:
                raise
        else:
            return
        self.add_equivalents(inputs, grad_output, *errors, interpreted=impl == "triton" and slowly(impl))
        own, peers = (list(zip(*of_inputs, strict=True)) for of_inputs in errors)
        typical = [min(e[0], statistics.median(e)) for e in own]
        assert_as_good_as_eager(op, dtype, results, eager, truth, terms, typical, [max(e) for e in peers])

    def add_equivalents(
        self,
        inputs: list[Tensor],
        grad_output: Tensor,
        own: list[list[float]],
        peers: list[list[float]],
        interpreted: bool,
    ) -> None:
        """Append the errors on inputs perturbed in their last bit, of eager and, unless `interpreted`, the operator."""
        op, generator = self.operator, torch.Generator().manual_seed(17)
        for _ in range(op.roundings - 1 if inputs[0].numel() < 1e5 else 2):
            noise = [torch.randn(t.shape, generator=generator).to(t) * torch.finfo(t.dtype).eps for t in inputs]
            other = [(t.detach() * (1 + n)).requires_grad_() for t, n in zip(inputs, noise, strict=True)]
            truth = self.run(op.reference, in_float64(other), grad_output=grad_output.double().cpu())
            for function, errors in ((op.public, own), (op.reference, peers))[interpreted:]:
                results = self.run(function, other, grad_output=grad_output)
                errors.append(list(map(relative_error, results, truth)))

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
            assert torch.autograd.gradcheck(lambda *t: op.public(*t, **op.options), inputs, fast_mode=True)

    def test_second_derivative_is_refused(self, impl: str) -> None:
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        output = op.public(*inputs, **op.options)
        (grad,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()

    def test_layout(self, impl: str, layout: str) -> None:
        """Every 4-D argument and the gradient of the output in another layout: nothing changes."""
        op = self.operator
        for dtype in dtypes_of(impl)[:1] + ((torch.bfloat16,) if impl != "triton" else ()):
            inputs = op.inputs(op.shapes[0], dtype, device_of(impl))
            with torch.no_grad():
                plain = op.public(*inputs, **op.options)
                grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5)).to(plain)
            expected = self.run(op.public, inputs, grad_output=grad)
            moved = [
                (LAYOUTS[layout](t.detach()) if t.dim() == 4 else t.detach()).requires_grad_() for t in inputs
            ]
            moved_grad = LAYOUTS[layout](grad) if grad.dim() == 4 else grad
            results = self.run(op.public, moved, grad_output=moved_grad)
            terms = op.terms(in_float64(inputs), grad.double().cpu()) if op.terms else {}
            for name, value, peer in zip(("output", *op.arguments), results, expected, strict=True):
                cancels = cancellation(terms.get(f"grad_{name}"), peer.double().cpu())
                bound = 4 * torch.finfo(dtype).eps * cancels
                assert relative_error(value, peer) <= bound, f"{name} changes in layout {layout}"
                assert not value.isnan().any(), name
            keeps = op.keeps_layout and moved[0].is_contiguous(memory_format=torch.channels_last)
            assert results[0].is_contiguous(memory_format=torch.channels_last if keeps else torch.contiguous_format)

    def test_expanded(self, impl: str) -> None:
        """Arguments repeated over the batch, and the constant gradient that ``sum().backward()`` sends."""
        op = self.operator
        inputs = [
            (t[:1].detach().expand(t.shape) if t.dim() == 4 else t.detach()).requires_grad_()
            for t in op.inputs(op.shapes[0], torch.float32, device_of(impl))
        ]
        grad = inputs[0].new_ones(1).expand(op.public(*inputs, **op.options).shape)
        self.compare(inputs, impl, grad_output=grad)

    def test_inputs_unchanged(self, impl: str) -> None:
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        output = op.public(*inputs, **op.options)
        grad = torch.randn_like(output)
        everything = [*inputs, grad]
        copies, versions = [t.detach().clone() for t in everything], [t._version for t in everything]
        op_output = op.public(*inputs, **op.options)
        results = [op_output, *torch.autograd.grad(op_output, inputs, grad)]
        for tensor, copy, version in zip(everything, copies, versions, strict=True):
            assert torch.equal(tensor, copy) and tensor._version == version
        memory = {t.untyped_storage().data_ptr() for t in everything}
        assert not memory & {t.untyped_storage().data_ptr() for t in results}, "a result shares memory with an input"

    def test_deterministic(self, impl: str) -> None:
        """Two runs give the same bits, on any number of threads."""
        op = self.operator
        inputs = op.inputs(op.shapes[-1], torch.float32, device_of(impl))
        threads = torch.get_num_threads()
        first = self.run(op.public, inputs)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            second = self.run(op.public, inputs)
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
                    grad = random_like(op.reference(*inputs, **op.options))
                results = self.run(op.public, inputs, grad_output=grad)
                eager = self.run(op.reference, inputs, grad_output=grad)
                truth = self.run(op.reference, in_float64(inputs), grad_output=grad.double().cpu())
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
            value, peer = op.public(*inputs, **op.options), op.reference(*inputs, **op.options)
        assert torch.equal(value.isnan(), peer.isnan())
        assert torch.equal(value.isinf(), peer.isinf())
        healthy = peer.isfinite()
        assert torch.allclose(value[healthy], peer[healthy], rtol=1e-4, atol=1e-5)

    def test_empty_batch(self, impl: str) -> None:
        op = self.operator
        inputs = op.inputs(op.empty, torch.float32, device_of(impl))
        results, expected = self.run(op.public, inputs), self.run(op.reference, inputs)
        for value, peer in zip(results, expected, strict=True):
            assert value.shape == peer.shape
            assert torch.equal(value, torch.zeros_like(value)), "gradients summed over nothing are zero"

    def test_registration(self, impl: str) -> None:
        """Schema, fake, autograd and AOT dispatch of every registered operator that forward and backward reach."""
        torch.use_deterministic_algorithms(False)
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        with _Recorder() as recorder:
            self.run(op.public, inputs)
        assert len(recorder.calls) >= 2
        for func, args in recorder.calls:
            leaves = tuple(
                a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
            )
            backward = func._schema.name.endswith("_backward")
            checks = ["test_schema", "test_faketensor"]
            if not backward:
                checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
            torch.library.opcheck(func, leaves, test_utils=checks)

    def test_compile(self, impl: str) -> None:
        """torch.compile(fullgraph=True) reaches the kernels and gives their gradients, aliased arguments included."""
        torch.use_deterministic_algorithms(False)
        op = self.operator
        inputs = op.inputs(op.shapes[0], torch.float32, device_of(impl))
        if op.alias is not None:
            first, second = (op.arguments.index(name) for name in op.alias)
            inputs[second] = inputs[first]
        distinct = list(dict.fromkeys(inputs))
        positions = [next(i for i, d in enumerate(distinct) if d is t) for t in inputs]

        def function(*tensors: Tensor) -> Tensor:
            return op.public(*(tensors[i] for i in positions), **op.options) * 2

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
                value = op.public(*inputs, **op.options)
            peer = op.reference(*inputs, **op.options)
        exact = op.reference(*in_float64(inputs), **op.options)
        assert value.dtype == peer.dtype
        allowed = max(ROUNDING_NOISE * relative_error(peer, exact), unavoidable(exact, value.dtype))
        assert relative_error(value, exact) <= allowed
        with torch.autocast("cpu", torch.bfloat16), mirage_kernels.use("cpp"):
            gradients = torch.autograd.grad(op.public(*inputs, **op.options).float().sum(), inputs)
        assert all(g.dtype == t.dtype for g, t in zip(gradients, inputs, strict=True))
