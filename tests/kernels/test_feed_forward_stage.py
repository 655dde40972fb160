"""feed_forward_stage: the kernel of inference, and the operators it is made of where a gradient is wanted."""

import pytest
import torch
from harness import LAYOUTS, relative_error, require, unavoidable

import mirage_kernels
from mirage_kernels import feed_forward_stage
from mirage_kernels.feed_forward_stage import reference

SHAPES = [
    (2, 6, 5, 7),
    (1, 3, 1, 1),
    (1, 5, 1, 37),
    (2, 4, 37, 1),
    (1, 24, 33, 47),
    (3, 30, 8, 8),
    (1, 50, 13, 90),
    (1, 96, 41, 29),
]
NAMES = ("norm_weight", "norm_bias", "project_in", "dwconv", "project_out")


def arguments(shape, dtype, hidden_ratio=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    channels = shape[1]
    hidden = hidden_ratio * channels
    weights = {
        "norm_weight": 1 + 0.1 * randn(channels),
        "norm_bias": 0.3 * randn(channels),
        "project_in": randn(2 * hidden, channels, 1, 1) / channels**0.5,
        "dwconv": randn(2 * hidden, 1, 3, 3) / 3,
        "project_out": randn(channels, hidden, 1, 1) / hidden**0.5,
    }
    return randn(*shape) * 2 + 0.5, weights


def in_double(x, weights):
    return reference(x.double(), **{name: w.double() for name, w in weights.items()})


@pytest.fixture(autouse=True)
def _cpp_over_poisoned_memory():
    require("cpp")
    torch.use_deterministic_algorithms(True)
    with mirage_kernels.use("cpp"), torch.inference_mode():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_truth(shape, dtype):
    x, weights = arguments(shape, dtype)
    value, eager, truth = feed_forward_stage(x, **weights), reference(x, **weights), in_double(x, weights)
    assert mirage_kernels.last_used("feed_forward_stage") == "cpp"
    assert value.dtype == dtype and value.shape == truth.shape and value.is_contiguous()
    if dtype == torch.float64:
        assert relative_error(value, truth) <= 1e-14
    else:
        factor = 2 if dtype == torch.float32 else 1.05
        assert relative_error(value, truth) <= max(factor * relative_error(eager, truth), unavoidable(truth, dtype))


def test_many_tiles_and_groups():
    """A plane of a quarter million pixels, and hidden channels that are no multiple of the group."""
    for shape, ratio in (((1, 7, 512, 512), 5), ((1, 48, 130, 226), 2)):
        x, weights = arguments(shape, torch.float32, hidden_ratio=ratio)
        truth = in_double(x, weights)
        limit = max(2 * relative_error(reference(x, **weights), truth), 1.2e-7)
        assert relative_error(feed_forward_stage(x, **weights), truth) <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout):
    x, weights = arguments((2, 6, 9, 20), torch.float32)
    expected = feed_forward_stage(x, **weights)
    assert torch.equal(feed_forward_stage(LAYOUTS[layout](x), **weights), expected)
    moved = {name: LAYOUTS["unaligned"](w) for name, w in weights.items()}
    assert torch.equal(feed_forward_stage(x, **moved), expected)


def test_expanded_and_empty():
    x, weights = arguments((1, 6, 9, 20), torch.float32)
    both = feed_forward_stage(x.expand(3, -1, -1, -1), **weights)
    assert torch.equal(both, feed_forward_stage(x, **weights).expand(3, -1, -1, -1))
    assert feed_forward_stage(x[:0], **weights).shape == (0, 6, 9, 20)


def test_inputs_unchanged_and_deterministic():
    x, weights = arguments((2, 24, 40, 56), torch.float32)
    copies = [t.clone() for t in (x, *weights.values())]
    first = feed_forward_stage(x, **weights)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = feed_forward_stage(x, **weights)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, second)
    assert all(torch.equal(t, copy) for t, copy in zip((x, *weights.values()), copies, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_near(poison):
    """A pixel reaches its own 3x3 neighbourhood and no further."""
    x, weights = arguments((1, 6, 40, 56), torch.float32)
    clean = feed_forward_stage(x, **weights)
    x[0, 2, 20, 28] = poison
    value, peer = feed_forward_stage(x, **weights), reference(x, **weights)
    assert torch.equal(value.isfinite(), peer.isfinite())
    untouched = torch.ones(40, 56, dtype=torch.bool)
    untouched[19:22, 27:30] = False
    assert torch.equal(value[..., untouched], clean[..., untouched])


@pytest.mark.parametrize("change", [lambda x: x * 0, lambda x: x * 0 + 3, lambda x: x * (200 / x.abs().max())])
def test_extremes(change):
    x, weights = arguments((1, 24, 9, 9), torch.float32)
    x = change(x)
    truth = in_double(x, weights)
    limit = max(2 * relative_error(reference(x, **weights), truth), 2.4e-7)
    assert relative_error(feed_forward_stage(x, **weights), truth) <= limit


def test_with_gradients_it_is_made_of_operators():
    x, weights = arguments((2, 6, 9, 11), torch.float64)
    with torch.inference_mode(False), torch.enable_grad():
        tensors = [t.clone().requires_grad_() for t in (x, *weights.values())]
        value = feed_forward_stage(*tensors)
        gradients = torch.autograd.grad(value.square().sum(), tensors)
        expected = torch.autograd.grad(reference(*tensors).square().sum(), tensors)
    for gradient, peer in zip(gradients, expected, strict=True):
        assert relative_error(gradient, peer) < 1e-12


def test_autocast_gives_the_reference_dtype():
    x, weights = arguments((1, 6, 9, 11), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, peer = feed_forward_stage(x, **weights), reference(x, **weights)
    truth = in_double(x, weights)
    assert value.dtype == peer.dtype
    assert relative_error(value, truth) <= 1.05 * relative_error(peer, truth)


def test_registration_and_compile():
    torch.use_deterministic_algorithms(False)
    x, weights = arguments((1, 6, 9, 11), torch.float32)
    with torch.inference_mode(False), torch.no_grad():
        x, *rest = (t.clone() for t in (x, *weights.values()))
        torch.library.opcheck(
            torch.ops.mirage_kernels.feed_forward_stage.default,
            (x, *rest, 1e-5, "cpp"),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
        torch._dynamo.reset()
        compiled = torch.compile(feed_forward_stage, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, *rest), feed_forward_stage(x, *rest))


def test_flops_are_those_of_the_reference():
    from torch.utils.flop_counter import FlopCounterMode

    x, weights = arguments((2, 6, 9, 11), torch.float32)
    with torch.inference_mode(False), torch.no_grad():
        counts = []
        for function in (feed_forward_stage, reference):
            with FlopCounterMode(display=False) as counter:
                function(x.clone(), **{name: w.clone() for name, w in weights.items()})
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_errors_name_the_argument():
    x, weights = arguments((1, 6, 9, 11), torch.float32)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[6, 9, 11\]"):
        feed_forward_stage(x[0], **weights)
    for name in NAMES:
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            feed_forward_stage(x, **{**weights, name: weights[name][:-1]})
    with pytest.raises(TypeError, match="project_in: expected torch.float32 like x, got torch.float64"):
        feed_forward_stage(x, **{**weights, "project_in": weights["project_in"].double()})
