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
    evaluate,
    forced,
    in_float64,
    relative_error,
    require,
    unavoidable,
)

import mirage_kernels
from mirage_kernels import feed_forward_stage
from mirage_kernels.channel_layer_norm import reference as channel_layer_norm
from mirage_kernels.feed_forward_stage import cases, reference
from mirage_kernels.gated_depthwise_ffn import reference as gated_depthwise_ffn

(OPERATOR,) = cases.CASES
_, *NAMES = OPERATOR.arguments
IMPLEMENTATIONS = StageTests.implementations


def arguments(shape, dtype=torch.float32, device="cpu", ratio=2):
    tensors = cases.make(shape, torch.Generator().manual_seed(0), ratio)
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def terms(inputs, grad_output):
    """The gradients of the layer norm's weights are sums over every pixel that may cancel; their terms."""
    x, norm_weight, norm_bias, *weights = (t.detach() for t in inputs)
    normal = channel_layer_norm(x, torch.ones_like(norm_weight), torch.zeros_like(norm_bias))
    scaled = (normal * norm_weight.view(1, -1, 1, 1) + norm_bias.view(1, -1, 1, 1)).requires_grad_()
    project_in, dwconv, project_out = weights
    y = F.conv2d(gated_depthwise_ffn(F.conv2d(scaled, project_in), dwconv), project_out)
    (grad,) = torch.autograd.grad(y, scaled, grad_output)
    return {"grad_norm_weight": grad * normal, "grad_norm_bias": grad}


class TestFeedForwardStage(StageTests):
    operator = OPERATOR
    terms = terms

    @pytest.mark.parametrize("wide", [(1, 24, 33, 47), (3, 30, 8, 8), (1, 50, 13, 90)], ids=str)
    @pytest.mark.parametrize("name", ["cpp", "composite", "cuda_alone"])
    def test_wide(self, name, wide):
        require(name)
        with forced(name):
            for dtype in (torch.float32, torch.bfloat16):
                self.compare(self.operator.inputs(wide, dtype), name)


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


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    require(request.param)
    with forced(request.param):
        yield request.param


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

def test_errors_name_the_argument():
    tensors = dict(zip(("x", *NAMES), arguments((1, 6, 9, 11)), strict=True))
    call = partial(feed_forward_stage, **tensors)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[6, 9, 11\]"):
        call(x=tensors["x"][0])
    for name in NAMES:
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            call(**{name: tensors[name][:-1]})
    with pytest.raises(TypeError, match="project_in: expected float32, float64, float16 or bfloat16, got torch.int64"):
        call(project_in=tensors["project_in"].long())
    with pytest.raises(ValueError, match="dwconv: expected a tensor on cpu like x, got meta"):
        call(dwconv=tensors["dwconv"].to("meta"))
