"""feed_forward_stage on C++, as a composite of operators (Triton) and as a composite of plain PyTorch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import (
    ON_GPU,
    ON_GPUS,
    ROUNDING_NOISE,
    StageTests,
    device_of,
    each_of,
    evaluate,
    forced,
    in_float64,
    relative_error,
    require,
    unavoidable,
)

import mirage_kernels
from mirage_kernels import feed_forward_stage
from mirage_kernels._runtime.norms import channel_norm
from mirage_kernels.feed_forward_stage import cases, reference

OPERATOR = cases.MIRAGE
_, *NAMES = OPERATOR.arguments
IMPLEMENTATIONS = StageTests.implementations


def arguments(shape, dtype=torch.float32, device="cpu", ratio=2):
    tensors = cases.make(shape, torch.Generator().manual_seed(0), ratio)
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def terms_of(operator, norm, activation, gate="gelu"):
    """The gradients of the norm's weights and of biases are sums over every pixel that may cancel; their terms."""

    def terms(inputs, grad_output):
        x, *tensors = (t.detach() for t in inputs)
        w = cases.of_names(operator.arguments[1:], tuple(tensors))
        normal = channel_norm(x, torch.ones_like(w.norm_weight), None, 1e-5, norm)
        bias = 0 if w.norm_bias is None else w.norm_bias.view(1, -1, 1, 1)
        scaled = (normal * w.norm_weight.view(1, -1, 1, 1) + bias).requires_grad_()
        hidden = F.conv2d(scaled, w.project_in, w.project_in_bias)
        activated = F.gelu(hidden) if activation == "gelu" else hidden
        mixed = activated.clone()
        if w.dwconv is not None:
            mixed = F.conv2d(activated, w.dwconv, w.dwconv_bias, padding=1, groups=hidden.shape[1])
        first, second = mixed.chunk(2, 1)
        gated = (F.gelu(first) if gate == "gelu" else first) * second
        means = gated.mean((2, 3), keepdim=True)
        scales = torch.ones_like(means) if w.excite is None else F.conv2d(means, w.excite, w.excite_bias)
        scaled_gated = gated * scales
        y = F.conv2d(scaled_gated, w.project_out, w.project_out_bias)
        inner = (scaled, hidden, mixed, scaled_gated)
        grad, grad_hidden, grad_mixed, grad_gated = torch.autograd.grad(y, inner, grad_output)
        return {
            "grad_excite_bias": grad_gated * gated,
            "grad_norm_weight": grad * normal,
            "grad_norm_bias": grad,
            "grad_project_in_bias": grad_hidden,
            "grad_dwconv_bias": grad_mixed,
            "grad_project_out_bias": grad_output,
        }

    return staticmethod(terms)


class FeedForwardTests(StageTests):
    wide = ((1, 24, 33, 47), (3, 30, 8, 8), (1, 50, 13, 90))


class RoundedAlike(FeedForwardTests):
    """Where few roundings are many: see `extremes_floor`."""

    def extremes_floor(self, x):
        """On a constant plane the gated channels are rounded alike at every pixel, which does not average out in sums
        over the plane, the excitation's gradients: 3.0 epsilons with AVX2, 2.2 with AVX-512, eager 1.5. A norm's
        gradients of a steep plane are 2.2 epsilons off by PyTorch's own steps, one after the other, eager's 0.9."""
        return 4


class TestFeedForwardStage(FeedForwardTests):
    operator = OPERATOR
    terms = terms_of(OPERATOR, "centred", "gelu")


class TestBiasFree(FeedForwardTests):
    """A norm that does not centre, no GELU after project_in, and odd numbers of hidden pairs."""

    operator = cases.BIAS_FREE
    terms = terms_of(operator, "uncentred", "none")
    implementations = ("cpp", "composite")


class TestBiased(RoundedAlike):
    """All convolutions with biases: the hidden tensor is not zero at the edge of a plane, and zero outside."""

    operator = cases.BIASED
    terms = terms_of(operator, "centred", "none")
    implementations = ("cpp", "composite")


class TestExcited(RoundedAlike):
    """NAFNet's first half: channels scaled by a product with their means."""

    operator = cases.EXCITED
    terms = terms_of(operator, "centred", "none", "none")
    implementations = ("cpp", "composite")


class TestPointwise(FeedForwardTests):
    """NAFNet's second half, which has no depthwise convolution."""

    operator = cases.POINTWISE
    terms = terms_of(operator, "centred", "none", "none")
    implementations = ("cpp", "composite")


@pytest.mark.skipif(ON_GPU, reason="all tests run Triton on this GPU")
def test_triton_in_the_interpreter():
    require("triton")
    inputs = arguments((1, 3, 3, 4))
    expected = evaluate(reference, in_float64(inputs))
    with mirage_kernels.use("triton"):
        results = evaluate(feed_forward_stage, inputs)
    assert mirage_kernels.last_used("feed_forward_stage") == "triton"
    for name, value, exact in zip(("y", "x", *NAMES), results, expected, strict=True):
        assert relative_error(value, exact) < 1e-5, name


impl = each_of(IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 24, 33, 47), (1, 50, 13, 90), (1, 96, 41, 29)], ids=str)
def test_wide_inference(shape, dtype):
    require("cpp")
    tensors = [t.detach() for t in arguments(shape, dtype)]
    truth = reference(*in_float64(tensors))
    with mirage_kernels.use("cpp"), torch.inference_mode():
        value, eager = feed_forward_stage(*tensors), reference(*tensors)
    if dtype == torch.float64:
        assert relative_error(value, truth) <= 1e-14
    else:
        factor = 2 if dtype == torch.float32 else ROUNDING_NOISE
        assert relative_error(value, truth) <= max(factor * relative_error(eager, truth), unavoidable(truth, dtype))


def test_many_tiles_and_groups():
    """A plane of a quarter million pixels, and hidden channels that are no multiple of a group."""
    require("cpp")
    for shape, ratio in (((1, 7, 512, 512), 5), ((1, 48, 130, 226), 2)):
        tensors = [t.detach() for t in arguments(shape, ratio=ratio)]
        truth = reference(*(t.double() for t in tensors))
        limit = max(2 * relative_error(reference(*tensors), truth), 1.2e-7)
        with mirage_kernels.use("cpp"):
            assert relative_error(feed_forward_stage(*tensors), truth) <= limit


def test_empty_batches_of_any_strides():
    require("cpp")
    x, *weights = (t.detach() for t in arguments((0, 6, 5, 7)))
    with mirage_kernels.use("cpp"), torch.inference_mode():
        for layout in (torch.contiguous_format, torch.channels_last):
            value = feed_forward_stage(x.contiguous(memory_format=layout), *weights)
            assert value.shape == x.shape
        assert feed_forward_stage(x.transpose(2, 3), *weights).shape == (0, 6, 7, 5)


def remember(sizes, tensor):
    sizes.append(tensor.numel())
    return tensor


def test_keep_hidden_changes_memory_only(impl):
    """More is kept (on GPUs not), the results are the same to rounding."""
    tensors = arguments((2, 6, 9, 11), device=device_of(impl))
    results, kept = [], []
    for keep in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, sizes), lambda t: t):
            value = feed_forward_stage(*tensors, keep_hidden=keep)
        results.append([value, *torch.autograd.grad(value.square().sum(), tensors)])
        kept.append(sum(sizes))
    parameters = sum(t.numel() for t in tensors[1:])
    more = 1 if impl in ON_GPUS else 5
    assert kept == [parameters + tensors[0].numel(), parameters + tensors[0].numel() * more]
    for low, fast in zip(*results, strict=True):
        assert relative_error(fast, low) < 1e-6


def test_weights_of_other_dtypes(impl):
    """Gradients come in the dtype of each weight."""
    tensors = arguments((2, 6, 9, 11), device=device_of(impl))
    x, *weights = (t.detach() for t in tensors)
    mixed = [t.requires_grad_() for t in (x, *(w.to(torch.bfloat16) for w in weights))]
    expected = evaluate(reference, in_float64(mixed))
    results = evaluate(feed_forward_stage, mixed)
    for result, peer, argument in zip(results, expected, [mixed[0], *mixed], strict=True):
        assert result.dtype == argument.dtype
        assert relative_error(result, peer) < (1e-5 if result.dtype == torch.float32 else 4e-3)


def test_frozen_weights_and_input(impl):
    tensors = arguments((1, 4, 9, 11), device=device_of(impl))
    expected = torch.autograd.grad(reference(*tensors).square().sum(), tensors)
    for chosen in ([0], [3], [1, 5]):
        some = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(tensors)]
        grads = torch.autograd.grad(feed_forward_stage(*some).square().sum(), [some[i] for i in chosen])
        for grad, i in zip(grads, chosen, strict=True):
            assert relative_error(grad, expected[i]) < 1e-5
    assert not feed_forward_stage(*(t.detach() for t in tensors)).requires_grad


def test_second_derivatives_of_the_reference():
    tensors = arguments((1, 4, 3, 3), torch.float64)
    with mirage_kernels.use("torch"):
        value = feed_forward_stage(*tensors)
        (grad,) = torch.autograd.grad(value.square().sum(), tensors[:1], create_graph=True)
        grad.square().sum().backward()
    assert tensors[3].grad.norm() > 0


FORMS = [
    (norm, activation, gate)
    for norm in ("centred", "uncentred")
    for activation in ("gelu", "none")
    for gate in ("gelu", "none")
]
CONVOLUTION, EXCITATION = ("dwconv", "dwconv_bias"), ("excite", "excite_bias")
ABSENT = (
    EXCITATION,
    (),
    ("norm_bias", *EXCITATION),
    ("project_in_bias", "excite_bias"),
    ("dwconv_bias", "project_out_bias", *EXCITATION),
    CONVOLUTION,
    (*CONVOLUTION, *EXCITATION),
    ("norm_bias", "project_in_bias", "project_out_bias", *CONVOLUTION, *EXCITATION),
)


@pytest.mark.parametrize(("norm", "activation", "gate"), FORMS)
@pytest.mark.parametrize("keep_hidden", [False, True])
def test_every_form_with_each_weight(norm, activation, gate, keep_hidden, impl):
    """Values and gradients, in float64 where there is such a kernel."""
    dtype = torch.float32 if impl in ON_GPUS else torch.float64
    generator = torch.Generator().manual_seed(1)
    every = cases.make((2, 5, 9, 11), generator, 2.6, cases.FeedForwardWeights._fields)
    form = {"norm": norm, "activation": activation, "gate": gate}
    for absent in ABSENT:
        x, *weights = (t.to(device_of(impl), dtype).requires_grad_() for t in every)
        named = dict(zip(cases.FeedForwardWeights._fields, weights, strict=True))
        tensors = [x, *(t for name, t in named.items() if name not in absent)]
        w = cases.FeedForwardWeights(**{**named, **dict.fromkeys(absent)})
        expected = reference(x, *w, **form)
        value = feed_forward_stage(x, *w, keep_hidden=keep_hidden, **form)
        limit = 1e-12 if dtype == torch.float64 else 1e-5
        assert relative_error(value, expected) < limit
        grads = torch.autograd.grad(expected.square().sum(), tensors)
        for found, exact in zip(torch.autograd.grad(value.square().sum(), tensors), grads, strict=True):
            assert relative_error(found, exact) < limit


@pytest.mark.parametrize("sizes", [(48, 127), (30, 255), (20, 1021)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_numbers_of_hidden_pairs(sizes, dtype):
    require("cpp")
    channels, pairs = sizes
    generator = torch.Generator().manual_seed(2)
    names = cases.FeedForwardWeights._fields[:8]
    tensors = cases.make((1, channels, 37, 41), generator, pairs / channels, names)
    x, *weights = (t.to(dtype) for t in tensors)
    assert weights[2].shape[0] == 2 * pairs
    options = {"norm": "uncentred", "activation": "none"}
    truth = reference(x.double(), *(t.double() for t in weights), **options)
    with mirage_kernels.use("cpp"), torch.inference_mode():
        value, eager = feed_forward_stage(x, *weights, **options), reference(x, *weights, **options)
    factor = 2 if dtype == torch.float32 else ROUNDING_NOISE
    assert relative_error(value, truth) <= max(factor * relative_error(eager, truth), unavoidable(truth, dtype))


def test_kernels_for_gpus_say_what_they_lack():
    require("cuda")
    tensors = [t.detach().float() for t in cases.BIASED.inputs((1, 6, 5, 7), torch.float32)]
    with forced("cuda"):
        cases.BIASED.public(*tensors)
        assert mirage_kernels.last_used("feed_forward_stage") != "cuda"
        assert mirage_kernels.why_not("feed_forward_stage")["cuda"] == "its kernels have a GELU after project_in"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_near(poison):
    """A pixel reaches its own 3x3 neighbourhood and no further."""
    require("cpp")
    x, *weights = (t.detach() for t in arguments((1, 6, 40, 56)))
    with mirage_kernels.use("cpp"):
        clean = feed_forward_stage(x, *weights)
        x[0, 2, 20, 28] = poison
        value = feed_forward_stage(x, *weights)
    untouched = torch.ones(40, 56, dtype=torch.bool)
    untouched[19:22, 27:30] = False
    assert torch.equal(value[..., untouched], clean[..., untouched])


@pytest.mark.parametrize("ratio", [1, 2])
def test_excitation_of_many_tiles(ratio):
    """Gated channels lie in the memory of the result where they are as many as its own, at the same bits for every
    number of threads, and samples do not mix."""
    require("cpp")
    names = cases.EXCITED.arguments[1:]
    x, *weights = (t.float() for t in cases.make((2, 12, 150, 170), torch.Generator().manual_seed(3), ratio, names))
    call = partial(cases.EXCITED.call, feed_forward_stage)
    with mirage_kernels.use("cpp"), torch.inference_mode():
        value = call(x, *weights)
        truth = cases.EXCITED.call(reference, *(t.double() for t in (x, *weights)))
        limit = max(2 * relative_error(cases.EXCITED.call(reference, x, *weights), truth), 1.2e-7)
        assert relative_error(value, truth) <= limit
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(call(x, *weights), value)
        finally:
            torch.set_num_threads(threads)
        assert relative_error(call(x[1:], *weights), value[1:]) < 1e-6

def test_errors_name_the_argument():
    tensors = dict(zip(("x", *NAMES), arguments((1, 6, 9, 11)), strict=True))
    call = partial(feed_forward_stage, **tensors)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[6, 9, 11\]"):
        call(x=tensors["x"][0])
    for name in NAMES:
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            call(**{name: tensors[name][:-1]})
    for name, size in (("project_in_bias", 24), ("dwconv_bias", 24), ("project_out_bias", 6)):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \[{size}\]"):
            call(**{name: torch.ones(5)})
    with pytest.raises(TypeError, match="project_out: expected a tensor, got NoneType"):
        call(project_out=None)
    with pytest.raises(ValueError, match="norm: expected one of 'centred', 'uncentred', got 'rms'"):
        call(norm="rms")
    for name in ("activation", "gate"):
        with pytest.raises(ValueError, match=f"{name}: expected one of 'gelu', 'none', got 'relu'"):
            call(**{name: "relu"})
    with pytest.raises(ValueError, match=r"excite: expected shape \[12, 12, 1, 1\]"):
        call(excite=torch.ones(6, 6, 1, 1))
    with pytest.raises(ValueError, match="excite_bias: expected None where there is no excite, got a tensor"):
        call(excite_bias=torch.ones(12))
    with pytest.raises(ValueError, match="dwconv_bias: expected None where there is no dwconv, got a tensor"):
        call(dwconv=None, dwconv_bias=torch.ones(24))
    with pytest.raises(TypeError, match="project_in: expected float32, float64, float16 or bfloat16, got torch.int64"):
        call(project_in=tensors["project_in"].long())
    with pytest.raises(ValueError, match="dwconv: expected a tensor on cpu like x, got meta"):
        call(dwconv=tensors["dwconv"].to("meta"))
