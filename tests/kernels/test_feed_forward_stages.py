"""feed_forward_stages: scaled stages one after the other, all as one operator of the C++ library where no gradient is
wanted."""

import io

import pytest
import torch
from harness import device_of, each_of, relative_error, require, unavoidable
from torch.utils.flop_counter import FlopCounterMode

import mirage_kernels
from mirage_kernels import FeedForwardWeights, ScaledFeedForward, feed_forward_stage, feed_forward_stages
from mirage_kernels.feed_forward_stage import cases as stage_cases
from mirage_kernels.feed_forward_stages import reference
from mirage_kernels.feed_forward_stages.weights import folded, packed

IMPLEMENTATIONS = ("cpp", "composite", "torch")
FORM = {"norm": "centred", "activation": "none", "gate": "none"}
SMALL = (2, 12, 5, 7)
# Odd sizes, one pixel, one tile and many, planes of one line, several strips of tiles, an empty batch.
SHAPES = [SMALL, (1, 3, 1, 1), (3, 6, 9, 7), (1, 32, 130, 226), (2, 96, 41, 129), (1, 6, 700, 40), (0, 6, 5, 7)]
KINDS = {
    "excited": (stage_cases.EXCITED.arguments[1:], 1),
    "wide": (stage_cases.EXCITED.arguments[1:], 1.5),  # more gated channels than channels
    "pointwise": (stage_cases.POINTWISE.arguments[1:], 2),
    "depthwise": (stage_cases.BIASED.arguments[1:], 2),
}
RUNS = (
    ("excited", "pointwise"),
    ("pointwise",),
    ("pointwise", "depthwise", "pointwise"),
    ("excited", "pointwise", "excited", "pointwise"),
    ("wide", "excited", "depthwise"),
)


def stages_of(kinds, channels, dtype=torch.float32, device="cpu", scaled=True):
    """A stage of each kind, with weights, an epsilon and a scale of its own."""
    generator = torch.Generator().manual_seed(1)
    stages = []
    for i, kind in enumerate(kinds):
        names, ratio = KINDS[kind]
        _, *weights = stage_cases.make((1, channels, 1, 1), generator, ratio, names)
        scale = torch.randn(1, channels, 1, 1, generator=generator, dtype=torch.float64)
        tensors = [t.to(device, dtype) for t in weights]
        stages.append(
            ScaledFeedForward(
                stage_cases.of_names(names, tuple(tensors)), 1e-5 * (i + 1), scale.to(device, dtype) if scaled else None
            )
        )
    return stages


def image(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.5).to(device, dtype)


def in_turn(x, stages, **form):
    for stage in stages:
        x = feed_forward_stage(x, *folded(stage), eps=stage.eps, **form)
    return x


impl = each_of(IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kinds", RUNS, ids="-".join)
def test_the_bits_of_the_stages(kinds, shape, dtype):
    """Without scales: written over the result of the stage before, however the maps take turns; x stays as it is."""
    require("cpp")
    x, stages = image(shape, dtype), stages_of(kinds, shape[1], dtype, scaled=False)
    kept, before = x.clone(), torch.get_num_threads()
    try:
        with mirage_kernels.use("cpp"), torch.no_grad():
            expected = in_turn(x, stages, **FORM)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                value = feed_forward_stages(x, stages, **FORM)
                assert value.dtype == dtype and value.is_contiguous()
                assert torch.equal(value, expected)
                assert torch.equal(x, kept)
    finally:
        torch.set_num_threads(before)
    assert mirage_kernels.last_used("feed_forward_stages") == "cpp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, (1, 32, 33, 47), (1, 96, 13, 30)], ids=str)
@pytest.mark.parametrize("kinds", RUNS, ids="-".join)
def test_as_exact_as_eager(impl, kinds, shape, dtype):
    if impl == "torch":
        pytest.skip("is eager")
    x, stages = image(shape, dtype, device_of(impl)), stages_of(kinds, shape[1], dtype, device_of(impl))
    exact = stages_of(kinds, shape[1], torch.float64)
    for stage, wide in zip(stages, exact, strict=True):
        for given, target in zip(packed([stage])[0], packed([wide])[0], strict=True):
            target.copy_(given)
    truth = reference(x.double().cpu(), exact, **FORM)
    eager = relative_error(reference(x, stages, **FORM), truth)
    with torch.no_grad():
        value = feed_forward_stages(x, stages, **FORM)
    assert relative_error(value, truth) <= max((2 if dtype == torch.float32 else 1) * eager, unavoidable(truth, dtype))


@pytest.mark.parametrize("kinds", RUNS, ids="-".join)
def test_float64(impl, kinds):
    x, stages = image(SMALL, torch.float64), stages_of(kinds, 12, torch.float64)
    expected = reference(x, stages, **FORM)
    with torch.no_grad():
        assert relative_error(feed_forward_stages(x, stages, **FORM), expected) < 1e-13
        gelu = {"norm": "uncentred", "activation": "gelu", "gate": "gelu"}
        value = feed_forward_stages(x, stages, **gelu)
        assert relative_error(value, reference(x, stages, **gelu)) < 1e-13
        assert relative_error(value, expected) > 1e-3
        # A scale of any shape and dtype, and an epsilon that reaches its norm.
        flat = [s._replace(scale=s.scale.flatten().float(), eps=0.5) for s in stages]
        exact = [s._replace(scale=s.scale.double()) for s in flat]
        value = feed_forward_stages(x, flat, **FORM)
        assert relative_error(value, reference(x, exact, **FORM)) < 1e-13
        assert relative_error(value, expected) > 1e-3


@pytest.mark.parametrize("keep_hidden", [False, True])
def test_gradients_are_those_of_the_reference(impl, keep_hidden):
    x, stages = image(SMALL, torch.float64).requires_grad_(), stages_of(RUNS[3], 12, torch.float64)
    learned = [x, *(t.requires_grad_() for t in packed(stages)[0])]
    values = feed_forward_stages(x, stages, keep_hidden, **FORM), reference(x, stages, **FORM)
    results = [torch.autograd.grad(value.square().sum(), learned) for value in values]
    assert relative_error(*values) < 1e-13
    for found, right in zip(*results, strict=True):
        assert found.shape == right.shape and relative_error(found, right) < 1e-11


@pytest.mark.parametrize("which", ["x", "scale"])
def test_the_operator_alone_has_gradients(which):
    """As in a program that was recorded where none was wanted."""
    require("cpp")
    x, stages = image(SMALL), stages_of(RUNS[0], 12)
    wanted = (x if which == "x" else stages[1].scale).requires_grad_()
    y = torch.ops.mirage_kernels.feed_forward_stages(x, *packed(stages), *FORM.values(), "cpp")
    expected = reference(x, stages, **FORM)
    found, right = (torch.autograd.grad(result.square().mean(), wanted)[0] for result in (y, expected))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_strides(impl):
    """Of x any; of the weights too, which are copied then."""
    x, stages = image((2, 12, 9, 11), torch.float64), stages_of(RUNS[0], 12, torch.float64)
    with torch.no_grad():
        expected = feed_forward_stages(x, stages, **FORM)
        wide = torch.zeros(2, 12, 18, 33, dtype=x.dtype)[:, :, ::2, ::3]
        wide.copy_(x)
        for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).clone().transpose(2, 3), wide):
            value = feed_forward_stages(other, stages, **FORM)
            assert relative_error(value, expected) < 1e-13
            assert value.stride() == (other if other.is_contiguous(memory_format=torch.channels_last) else x).stride()
        spread = [
            ScaledFeedForward(
                FeedForwardWeights(*(None if w is None else torch.stack((w, w), -1)[..., 0] for w in s.weights)),
                s.eps,
                torch.stack((s.scale, s.scale), -1)[..., 1],
            )
            for s in stages
        ]
        assert not spread[0].scale.is_contiguous()
        assert relative_error(feed_forward_stages(x, spread, **FORM), expected) < 1e-13


def test_autocast(impl):
    x, stages = image(SMALL), stages_of(RUNS[0], 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value, expected = feed_forward_stages(x, stages, **FORM), in_turn(x, stages, **FORM)
    assert value.dtype == expected.dtype
    assert relative_error(value, expected) < 2e-2


@pytest.mark.skipif(mirage_kernels.available()["cpp"] != "yes", reason="needs the C++ library")
def test_results_do_not_depend_on_what_the_workspace_held():
    x, stages = image((1, 24, 40, 56)), stages_of(RUNS[4], 24)
    results = []
    for poison in (0.0, float("nan"), 1e30):
        with torch.no_grad(), mirage_kernels.use("cpp"):
            feed_forward_stages(torch.full_like(x, poison), stages, **FORM)
            results.append(feed_forward_stages(x, stages, **FORM))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_registered_right():
    require("cpp")
    x, stages = image(SMALL), stages_of(RUNS[0], 12)
    operator = torch.ops.mirage_kernels.feed_forward_stages.default
    tensors, present, eps = packed(stages)
    arguments = (x, tensors, present, eps, *FORM.values(), "cpp")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, arguments, test_utils=tests)
    with pytest.raises(ValueError, match="weights: expected 11 for 1 stages, got 22"):
        operator(x, tensors, present, eps[1:], *FORM.values(), "cpp")
    for others in (tensors[1:], [*tensors, x]):
        with pytest.raises(ValueError, match=f"weights: expected 18 tensors, .* got {len(others)}"):
            operator(x, others, present, eps, *FORM.values(), "cpp")
    with pytest.raises(ValueError, match="stages: expected at least one, got 0"):
        operator(x, [], [], [], *FORM.values(), "cpp")


def test_flops_are_those_of_the_stages(impl):
    x, stages = image((1, 24, 16, 16)), stages_of(RUNS[3], 24)
    counts = []
    for function in (lambda: feed_forward_stages(x, stages, **FORM), lambda: in_turn(x, stages, **FORM)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiles_in_one_graph(impl):
    x, stages = image(SMALL), stages_of(RUNS[0], 12)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: feed_forward_stages(x, stages, **FORM), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), feed_forward_stages(x, stages, **FORM), rtol=1e-5, atol=1e-5)


def test_traced_and_exported(impl):
    """Programs that outlive the call, on other sizes too."""
    stages, images = stages_of(RUNS[0], 12), [image(SMALL), image((1, 12, 8, 3))]

    class Run(torch.nn.Module):
        def forward(self, x):
            return feed_forward_stages(x, stages, **FORM)

    with torch.no_grad():
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(Run(), images[0]), file)
        file.seek(0)
        traced = torch.jit.load(file)
        exported = torch.export.export(Run(), (images[0],)).module()
        for x in images:
            torch.testing.assert_close(traced(x), Run()(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exported(images[0]), Run()(images[0]), rtol=1e-5, atol=1e-5)


def _with(stage, **weights):
    return stage._replace(weights=stage.weights._replace(**weights))


WRONG = {
    "x: expected a tensor, got list": lambda x, s: ([1.0], s),
    "x: expected float32, float64, float16 or bfloat16, got torch.int64": lambda x, s: (x.long(), s),
    "x: expected 4 dimensions, got shape": lambda x, s: (x[0], s),
    "stages: expected at least one, got none": lambda x, s: (x, []),
    "stages: expected ScaledFeedForward, got tuple": lambda x, s: (x, [s[0], tuple(s[1])]),
    "weights: expected FeedForwardWeights, got list": lambda x, s: (x, [s[0]._replace(weights=list(s[0].weights))]),
    "norm_weight: expected shape": lambda x, s: (x, [s[0], _with(s[1], norm_weight=s[1].weights.norm_weight[1:])]),
    "dwconv_bias: expected None where there is no dwconv, got a tensor": lambda x, s: (
        x,
        [_with(s[0], dwconv=None)],
    ),
    "excite: expected shape": lambda x, s: (x, [_with(s[0], excite=s[0].weights.excite[1:])]),
    "scale: expected a tensor, got float": lambda x, s: (x, [s[0]._replace(scale=1.0)]),
    "scale: expected float32": lambda x, s: (x, [s[0]._replace(scale=s[0].scale.int())]),
    r"scale: expected 12 elements \(C channels of x\), got \[1, 11, 1, 1\]": lambda x, s: (
        x,
        [s[0], s[1]._replace(scale=s[1].scale[:, 1:])],
    ),
    "scale: expected a tensor on cpu like x, got meta": lambda x, s: (x, [s[0]._replace(scale=s[0].scale.to("meta"))]),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "gradients"])
@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(impl, message, grad):
    """The same words whichever implementation would have run, although the C++ library is asked first."""
    x, stages = image(SMALL).requires_grad_(grad), stages_of(RUNS[0], 12)
    with pytest.raises((TypeError, ValueError), match=message):
        feed_forward_stages(*WRONG[message](x, stages), **FORM)


MALFORMED = {
    "one number": lambda w: torch.tensor(1.0),
    "one row": lambda w: w[:1],
    "one row too few": lambda w: w[1:],
    "a dimension too few": lambda w: w[..., 0],
    "a dimension too many": lambda w: w[None],
    "whole numbers": lambda w: torch.ones_like(w, dtype=torch.int32),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["bare", "scaled"])
@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "gradients"])
@pytest.mark.parametrize("malformed", MALFORMED)
def test_malformed_weights_are_refused_by_name(impl, malformed, grad, scaled):
    """A product with the scale would give some of them the right shape, or dtype."""
    x, (stage, *_) = image(SMALL).requires_grad_(grad), stages_of(("excited",), 12, scaled=scaled)
    for name, weight in stage.weights._asdict().items():
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            feed_forward_stages(x, [_with(stage, **{name: MALFORMED[malformed](weight)})], **FORM)


@pytest.mark.parametrize("name", ["norm", "activation", "gate"])
def test_errors_name_the_form(impl, name):
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name}: expected"):
        feed_forward_stages(image(SMALL), stages_of(RUNS[0], 12), **{**FORM, name: "relu"})
