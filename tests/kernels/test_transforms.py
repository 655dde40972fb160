"""Operators and workspace functions in traces, graphs, modes and transforms: whoever records a call sees all of it."""

import io

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mirage_kernels
from mirage_kernels import workspace
from mirage_kernels._runtime import transforms

SHAPE, OTHER = (1, 48, 64, 64), (2, 48, 40, 72)  # each above 64 KiB, where results come from the workspace
WORKSPACE = {
    "add": (lambda x: workspace.add(x, x), lambda x: x + x),
    "concatenate": (lambda x: workspace.concatenate(x, x), lambda x: torch.cat((x, x), 1)),
    "pixel_shuffle": (lambda x: workspace.pixel_shuffle(x, 2), lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": (lambda x: workspace.pixel_unshuffle(x, 2), lambda x: F.pixel_unshuffle(x, 2)),
}
workspace_functions = pytest.mark.parametrize(("function", "expected"), WORKSPACE.values(), ids=WORKSPACE)
needs_cpp = pytest.mark.skipif(mirage_kernels.available()["cpp"] != "yes", reason="the C++ library is not there")


class DispatchMode(TorchDispatchMode):
    """Keeps the names of the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Doubling(TorchFunctionMode):
    """A mode that changes what PyTorch's functions give."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if isinstance(result, torch.Tensor) and result.dim() == 4 else result


@pytest.fixture
def images():
    """Two of the traced shape and one of another."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) for shape in (SHAPE, SHAPE, OTHER)]


def check_recorded(record, expected, images):
    """A program recorded of the first image is right for all, and what it gave before stays."""
    program = record(images[0])
    results = [program(x) for x in images]
    for result, x in zip(results, images, strict=True):
        torch.testing.assert_close(result, expected(x), rtol=1e-4, atol=1e-4)


def saved_and_loaded(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@workspace_functions
def test_workspace_functions_are_traced(function, expected, images):
    check_recorded(lambda x: torch.jit.trace(function, x), expected, images)
    check_recorded(lambda x: saved_and_loaded(torch.jit.trace(function, x)), expected, images)
    check_recorded(lambda x: make_fx(function)(x), expected, images[:2])
    check_recorded(lambda x: make_fx(function, tracing_mode="symbolic")(x), expected, images)
    check_recorded(lambda x: make_fx(function, pre_dispatch=True)(x), expected, images[:2])


@workspace_functions
def test_workspace_functions_are_transformed(function, expected, images):
    x, other, _ = images
    stacked = torch.stack((x, other))
    assert torch.equal(torch.vmap(function)(stacked), torch.stack((expected(x), expected(other))))
    assert torch.equal(torch.func.functionalize(function)(x), expected(x))
    assert torch.equal(torch.func.functionalize(torch.vmap(function))(stacked)[1], expected(other))
    for f in (function, lambda v: torch.vmap(function)(v[None])[0]):
        value, tangent = torch.func.jvp(f, (x,), (other,))
        assert torch.equal(value, expected(x)) and torch.equal(tangent, expected(other))
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, other))).tangent
    assert torch.equal(tangent, expected(other))
    assert torch.equal(
        torch.func.grad(lambda v: function(v).square().sum())(x),
        torch.func.grad(lambda v: expected(v).square().sum())(x),
    )


@workspace_functions
def test_workspace_functions_have_gradients(function, expected, images):
    x = images[0].requires_grad_()
    y = function(x)
    assert torch.equal(y, expected(x))
    found, right = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (function, expected))
    assert torch.equal(found, right)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not function(x).requires_grad


@workspace_functions
def test_modes_see_workspace_functions(function, expected, images):
    x, y = images[0], expected(images[0])
    with DispatchMode() as mode, torch.no_grad():
        assert torch.equal(function(x), y)
    assert mode.seen and not any(".out" in name or "copy_" in name for name in mode.seen)
    with Doubling(), torch.no_grad():
        result = function(x)
    assert torch.equal(result, 2 * y)
    with FakeTensorMode() as fake:
        imagined = function(fake.from_tensor(x))
    assert imagined.fake_mode is fake and imagined.shape == y.shape


@workspace_functions
def test_tensors_that_are_not_what_they_look_like(function, expected, images):
    x = images[0]
    wrapped = torch._to_functional_tensor(x)
    y = function(wrapped)
    assert torch._is_functional_tensor(y)
    torch._sync(y)
    assert torch.equal(torch._from_functional_tensor(y), expected(x))
    zero = torch._efficientzerotensor(SHAPE)
    assert torch.equal(function(zero) + torch.zeros(()), expected(torch.zeros(SHAPE)))
    negative = torch.complex(x, -x).conj().imag  # carries the Negative key
    assert negative.is_neg() and torch.equal(function(negative), expected(x))


@needs_cpp
@workspace_functions
def test_the_workspace_is_used_only_by_the_cpp_implementation(function, expected, images):
    x = images[0]
    mirage_kernels.release_workspace()
    with mirage_kernels.use("torch"), torch.no_grad():
        function(x)
    assert mirage_kernels.release_workspace() == 0
    with torch.no_grad():
        function(x)
    assert mirage_kernels.release_workspace() > 0


def test_a_plain_call_is_not_taken_for_a_watched_one():
    x = torch.rand(2, 3)
    assert transforms.nobody_watches(x, torch.nn.Parameter(x))
    with torch.inference_mode():
        assert transforms.nobody_watches(x, x + 1)
    with torch.no_grad(), torch.autocast("cpu"):
        assert transforms.nobody_watches(x)
    assert transforms.nobody_watches(x.T) and transforms.problem() == ""


# ---- operators -----------------------------------------------------------------------------------------------------


def norm(x):
    return mirage_kernels.channel_layer_norm(x, torch.linspace(0.5, 2, x.shape[1]), torch.linspace(-1, 1, x.shape[1]))


def dense(x):
    weight = torch.linspace(0, 20, x.shape[1] ** 2 * 9).sin().view(x.shape[1], x.shape[1], 3, 3)
    return mirage_kernels.dense_conv2d(x, weight)


def attention(x):
    q, k, v = (t.contiguous() for t in x.chunk(3, 1))
    return mirage_kernels.channel_attention(q, k, v, torch.tensor([1.0, 2.0]), 2)


def gated(x):
    return mirage_kernels.gated_depthwise_ffn(x, torch.linspace(-1, 1, x.shape[1] * 9).view(x.shape[1], 1, 3, 3))


OPERATORS = {"norm": norm, "dense": dense, "attention": attention, "gated": gated}
operators = pytest.mark.parametrize("function", OPERATORS.values(), ids=OPERATORS)


def reference(function):
    def run(x):
        with mirage_kernels.use("torch"):
            return function(x)

    return run


@operators
def test_recorded_operators(function, images):
    right = reference(function)
    check_recorded(lambda x: torch.jit.trace(function, x), right, images)
    check_recorded(lambda x: saved_and_loaded(torch.jit.trace(function, x)), right, images)
    check_recorded(lambda x: make_fx(function)(x), right, images[:2])


@operators
def test_transformed_operators(function, images):
    x, other, _ = (t[..., :12, :10].contiguous() for t in images)
    right = reference(function)
    torch.testing.assert_close(torch.vmap(function)(torch.stack((x, other)))[1], right(other))
    torch.testing.assert_close(torch.func.functionalize(function)(x), right(x))
    found, expected = (torch.func.jvp(f, (x,), (other,)) for f in (function, right))
    assert expected[1].abs().max() > 0.01
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, other))).tangent
    torch.testing.assert_close(tangent, expected[1])
    found, expected = (torch.func.grad(lambda v, f=f: f(v).square().mean())(x) for f in (function, right))
    torch.testing.assert_close(found, expected)
    # per sample
    found, expected = (
        torch.vmap(torch.func.grad(lambda v, f=f: f(v[None]).square().mean()))(torch.cat((x, other)))
        for f in (function, right)
    )
    torch.testing.assert_close(found, expected)


@needs_cpp
@operators
def test_a_forced_implementation_says_that_it_has_no_rule(function, images):
    x = images[0]
    with mirage_kernels.use("cpp"):
        with pytest.raises(RuntimeError, match="'cpp' was asked for but cannot run: .*torch.func"):
            torch.vmap(function)(x[None])
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="cannot run: .*forward-mode derivatives"):
            function(forward_ad.make_dual(x, x))


@needs_cpp
def test_operators_that_are_called_past_their_functions_do_not_drop_derivatives(images):
    x, weight = images[0], torch.rand(8, 48, 3, 3)
    run = torch.ops.mirage_kernels.dense_conv2d
    way_out = r'has no rule for {}.*mirage_kernels.use\("torch"\).*mirage.fast.revert'
    with forward_ad.dual_level():
        run(x, weight, "cpp")  # there is no tangent to drop
        with pytest.raises(NotImplementedError, match=way_out.format("forward-mode derivatives")):
            run(forward_ad.make_dual(x, x), weight, "cpp")
        with torch.no_grad(), pytest.raises(NotImplementedError, match=way_out.format("forward-mode derivatives")):
            run(x, forward_ad.make_dual(weight, weight), "cpp")
    with pytest.raises(NotImplementedError, match=way_out.format("torch.func.vmap")):
        torch.vmap(lambda v: run(v, weight, "cpp"))(x[None])
    with pytest.raises(NotImplementedError, match=way_out.format("transforms of torch.func")):
        torch.func.grad(lambda v: run(v, weight, "cpp").sum())(x)


def test_a_compiled_function_takes_the_kernels_again_after_a_transform(images):
    x = images[0]
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    expected = norm(x)
    chosen = mirage_kernels.last_used("channel_layer_norm")
    torch.testing.assert_close(compiled(x), expected)
    assert mirage_kernels.last_used("channel_layer_norm") == chosen
