"""channel_attention_stage on C++ and as a composite: of plain PyTorch, and on GPUs of Triton's operators."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attention_terms import of_attention
from harness import (
    ON_GPU,
    ROUNDING_NOISE,
    StageTests,
    device_of,
    each_of,
    evaluate,
    in_float64,
    relative_error,
    require,
    unavoidable,
)

import mirage_kernels
from mirage_kernels import ChannelAttentionWeights, channel_attention_stage
from mirage_kernels._runtime.norms import channel_norm
from mirage_kernels.channel_attention.reference import channel_attention
from mirage_kernels.channel_attention_stage import cases, reference

IMPLEMENTATIONS = ("cpp", "composite", *(("triton",) if ON_GPU else ()))
WIDE = ((1, 48, 33, 47, 1), (3, 30, 8, 8, 2), (1, 96, 13, 30, 1), (2, 160, 9, 11, 4))
SMALL = (2, 12, 9, 11, 2)


def arguments(operator, shape, dtype=torch.float32, device="cpu"):
    return [t.to(device, dtype).requires_grad_() for t in operator.make(shape, torch.Generator().manual_seed(0))]


def terms(inputs, grad_output, without, norm="centred"):
    """The terms of gradients that are sums over every pixel: those of the weight, had every pixel its own."""
    x, w = inputs[0].detach(), cases.weights_of(tuple(t.detach() for t in inputs[1:]), without)
    own = {}

    def spread(name, shape):
        value = getattr(w, name)
        own[name] = value.view(1, -1, 1, 1).expand(shape).clone().requires_grad_()
        return own[name]

    plain = torch.ones_like(w.norm_weight)
    normal = channel_norm(x, plain, None, 1e-5, norm) * spread("norm_weight", x.shape)
    if w.norm_bias is not None:
        normal = normal + spread("norm_bias", x.shape)
    qkv = F.conv2d(normal, w.qkv)
    for name in ("qkv_bias", "qkv_dwconv_bias"):
        if name == "qkv_dwconv_bias":
            qkv = F.conv2d(qkv, w.qkv_dwconv, padding=1, groups=qkv.shape[1])
        if getattr(w, name) is not None:
            qkv = qkv + spread(name, qkv.shape)
    q, k, v = qkv.chunk(3, 1)
    attended = channel_attention(q, k, v, w.temperature, w.temperature.shape[0])
    y = F.conv2d(attended, w.project_out)
    if w.project_out_bias is not None:
        y = y + spread("project_out_bias", y.shape)
    gradients = torch.autograd.grad(y, [*own.values(), attended], grad_output)
    found = dict(zip((f"grad_{name}" for name in own), gradients, strict=False))
    return found | of_attention([q, k, v, w.temperature], gradients[-1])


class AttentionStageTests(StageTests):
    implementations = IMPLEMENTATIONS
    wide = WIDE

    def extremes_floor(self, x):
        """About as many roundings follow each other."""
        return 40


class TestCentred(AttentionStageTests):
    operator = cases.CENTRED
    terms = partial(terms, without=cases.BIASES)


class TestBiases(AttentionStageTests):
    operator = cases.WITH_BIASES
    terms = partial(terms, without=())


class TestUncentred(AttentionStageTests):
    operator = cases.UNCENTRED
    terms = partial(terms, without=("norm_bias", *cases.BIASES), norm="uncentred")


@pytest.mark.skipif(ON_GPU, reason="all tests run Triton on this GPU")
def test_triton_in_the_interpreter():
    require("triton")
    operator = cases.CENTRED
    inputs = arguments(operator, (1, 6, 3, 4, 2))
    expected = evaluate(operator.reference, in_float64(inputs))
    with mirage_kernels.use("triton"):
        results = evaluate(operator.public, inputs)
    assert mirage_kernels.last_used("channel_attention_stage") == "triton"
    for name, value, exact in zip(("y", *operator.arguments), results, expected, strict=True):
        assert relative_error(value, exact) < 1e-5, name


impl = each_of(IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", cases.CASES, ids=lambda operator: operator.mode or "centred")
def test_wide_inference(operator, dtype):
    require("cpp")
    for shape in (*WIDE, (1, 96, 64, 64, 2)):
        tensors = [t.detach() for t in arguments(operator, shape, dtype)]
        truth = operator.reference(*in_float64(tensors))
        with mirage_kernels.use("cpp"), torch.inference_mode():
            value, eager = operator.public(*tensors), operator.reference(*tensors)
        if dtype == torch.float64:
            assert relative_error(value, truth) <= 1e-14
        else:
            factor = 2 if dtype == torch.float32 else ROUNDING_NOISE
            limit = max(factor * relative_error(eager, truth), unavoidable(truth, dtype))
            assert relative_error(value, truth) <= limit


def test_backward_keeps_x_the_weights_and_small_matrices(impl):
    tensors = arguments(cases.CENTRED, SMALL, device=device_of(impl))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        cases.CENTRED.public(*tensors)
    depth = 6
    assert sum(kept) == sum(t.numel() for t in tensors) + 2 * 2 * (2 * depth + 2) * depth


def test_weights_of_other_dtypes(impl):
    """Gradients come in the dtype of each weight."""
    x, *weights = (t.detach() for t in arguments(cases.WITH_BIASES, SMALL, device=device_of(impl)))
    mixed = [t.requires_grad_() for t in (x, *(w.to(torch.bfloat16) for w in weights))]
    expected = evaluate(cases.WITH_BIASES.reference, in_float64(mixed))
    results = evaluate(cases.WITH_BIASES.public, mixed)
    for result, peer, argument in zip(results, expected, [mixed[0], *mixed], strict=True):
        assert result.dtype == argument.dtype
        assert relative_error(result, peer) < (1e-5 if result.dtype == torch.float32 else 4e-3)


def test_frozen_weights_and_input(impl):
    tensors = arguments(cases.WITH_BIASES, SMALL, device=device_of(impl))
    expected = torch.autograd.grad(cases.WITH_BIASES.reference(*tensors).square().sum(), tensors)
    for chosen in ([0], [3], [1, 5]):
        some = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(tensors)]
        grads = torch.autograd.grad(cases.WITH_BIASES.public(*some).square().sum(), [some[i] for i in chosen])
        for grad, i in zip(grads, chosen, strict=True):
            assert relative_error(grad, expected[i]) < 1e-5
    assert not cases.WITH_BIASES.public(*(t.detach() for t in tensors)).requires_grad


def test_second_derivatives_of_the_reference():
    tensors = arguments(cases.CENTRED, (1, 4, 3, 3, 2), torch.float64)
    with mirage_kernels.use("torch"):
        value = cases.CENTRED.public(*tensors)
        (grad,) = torch.autograd.grad(value.square().sum(), tensors[:1], create_graph=True)
        grad.square().sum().backward()
    assert tensors[3].grad.norm() > 0


def test_samples_do_not_meet():
    """Each has matrices of its own."""
    require("cpp")
    tensors = [t.detach() for t in arguments(cases.WITH_BIASES, (3, 12, 9, 11, 2))]
    with mirage_kernels.use("cpp"):
        together = cases.WITH_BIASES.public(*tensors)
        for i in range(3):
            alone = cases.WITH_BIASES.public(tensors[0][i : i + 1], *tensors[1:])
            assert relative_error(together[i : i + 1], alone) < 1e-6


def test_weights_are_named():
    """C++ has the same, in the same order: lists of tensors cross between the languages without names."""
    require("cpp")
    names = mirage_kernels._runtime.dispatch.native.stage_weights
    for name in ("channel_attention_stage", "channel_attention_stage_gradients"):
        assert names[name] == ChannelAttentionWeights._fields


def test_cuda_declines():
    reasons = cases.DECLINED
    with pytest.raises(RuntimeError, match="channel_attention_stage"), mirage_kernels.use("cuda", strict=True):
        cases.CENTRED.public(*arguments(cases.CENTRED, SMALL))
    assert "chain of Triton's operators" in reasons["cuda"]


def test_errors_name_the_argument():
    x, *given = arguments(cases.WITH_BIASES, SMALL)
    weights = cases.weights_of(tuple(given))
    call = partial(channel_attention_stage, weights=weights)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[12, 9, 11\]"):
        call(x[0])
    with pytest.raises(ValueError, match="temperature: expected a head count that divides 12 channels of x, got 5"):
        call(x, weights=weights._replace(temperature=torch.ones(5, 1, 1)))
    for name in ChannelAttentionWeights._fields:
        if name != "temperature":
            with pytest.raises(ValueError, match=f"{name}: expected shape"):
                call(x, weights=weights._replace(**{name: getattr(weights, name)[:-1]}))
    with pytest.raises(TypeError, match="qkv: expected a tensor, got NoneType"):
        call(x, weights=weights._replace(qkv=None))
    with pytest.raises(ValueError, match="norm: expected one of 'centred', 'uncentred', got 'none'"):
        call(x, norm="none")
    with pytest.raises(TypeError, match="weights: expected ChannelAttentionWeights, got list"):
        call(x, weights=given)
    assert reference(x, weights).shape == x.shape
