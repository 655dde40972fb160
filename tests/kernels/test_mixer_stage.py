"""mixer_stage on C++, as a composite of operators (Triton) and as a composite of plain PyTorch."""

from functools import partial
from importlib import import_module
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from harness import (
    ON_GPU,
    StageTests,
    device_of,
    each_of,
    evaluate,
    in_float64,
    relative_error,
    require,
)

import mirage_kernels
from mirage_kernels import MixerWeights, mixer_stage
from mirage_kernels._runtime import accuracy
from mirage_kernels.channel_layer_norm import reference as channel_layer_norm
from mirage_kernels.mixer_stage import cases, reference
from mirage_kernels.mixer_stage.cases import call as flat
from mirage_kernels.mixer_stage.weights import LEARNED

IMPLEMENTATIONS = StageTests.implementations
SMALL = (2, 12, 5, 7, 2)


def arguments(shape, dtype=torch.float32, device="cpu"):
    return [t.to(device, dtype).requires_grad_() for t in cases.make(shape, torch.Generator().manual_seed(0))]


def terms(inputs, grad_output, **options):
    """The terms of gradients that are sums over every pixel: those of the weight, had every pixel its own."""
    x, *learned = (t.detach() for t in inputs)
    named, own = dict(zip(LEARNED, learned, strict=True)), {}

    def spread(name, shape):
        shaped = named[name].view(1, -1, 1, 1) if named[name].numel() > 1 else named[name]
        own[name] = shaped.expand(shape).clone().requires_grad_()
        return own[name]

    def layer_norm(x, weight, bias, eps):
        normal = channel_layer_norm(x, torch.ones_like(weight), torch.zeros_like(bias), eps)
        return normal * spread("norm_weight", x.shape) + spread("norm_bias", x.shape)

    def batch_norm(x, mean, var, weight, bias, *rest):
        normal = F_BATCH_NORM(x, mean, var, None, None, *rest)
        return normal * spread("bn_weight", x.shape) + spread("bn_bias", x.shape)

    batch, channels, height, width = x.shape
    maps = {"gate_temperature": named["gic2"].shape[1], **dict.fromkeys(("alpha_att", "alpha_conv", "alpha_mlp"), 1)}
    for name, count in maps.items():
        spread(name, (batch, count if count > 1 else channels // 3, height, width))
    module = import_module("mirage_kernels.mixer_stage.reference")
    with mock.patch.object(module, "channel_layer_norm", layer_norm), mock.patch.object(F, "batch_norm", batch_norm):
        y = flat(reference, x, *({**named, **{name: own[name] for name in maps}}.values()), **options)
    gradients = torch.autograd.grad(y, list(own.values()), grad_output)
    return dict(zip((f"grad_{name}" for name in own), gradients, strict=True))


F_BATCH_NORM = F.batch_norm


class MixerTests(StageTests):
    wide = ((1, 24, 33, 47, 1), (3, 30, 8, 8, 2), (1, 96, 13, 30, 4))

    def extremes_floor(self, x):
        """About as many roundings follow each other; the batch norm of a constant plane magnifies them."""
        return 40


class TestEval(MixerTests):
    operator = cases.EVAL
    terms = terms

    def test_large(self, impl, monkeypatch):
        """The composite's gradients of weights are PyTorch's sums over planes in float32; `proj_out`'s is 3.0 times
        as far off as eager's where PyTorch has no AVX (`ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41`)."""
        if impl == "composite":
            monkeypatch.setitem(accuracy.TIMES_EAGER, torch.float32, 4.0)
        super().test_large(impl)


class TestTraining(MixerTests):
    operator = cases.TRAINING
    terms = partial(terms, training=True, drop=True)


@pytest.mark.skipif(ON_GPU, reason="all tests run Triton on this GPU")
@pytest.mark.parametrize("training", [False, True])
def test_triton_in_the_interpreter(training):
    require("triton")
    inputs = arguments((1, 6, 3, 4, 2))
    expected = evaluate(partial(flat, reference), in_float64(inputs), training=training, drop=True)
    with mirage_kernels.use("triton"):
        results = evaluate(partial(flat, mixer_stage), inputs, training=training, drop=True)
    assert mirage_kernels.last_used("mixer_stage") == "triton"
    for name, value, exact in zip(("y", "x", *LEARNED), results, expected, strict=True):
        assert relative_error(value, exact) < 1e-5, name


impl = each_of(IMPLEMENTATIONS)


def weights_of(tensors, **more):
    """MixerWeights from x and the learned weights, with statistics of zero and one."""
    zeros = torch.zeros_like(tensors[1 + LEARNED.index("bn_weight")], requires_grad=False)
    named = dict(zip(LEARNED, tensors[1:], strict=True))
    return MixerWeights(**{**named, "bn_mean": zeros.detach(), "bn_var": torch.ones_like(zeros), **more})


def test_batch_statistics(impl):
    """Of the normalised input of the gated CNN; in eval mode the running ones, not an alias of them."""
    tensors = arguments(SMALL, device=device_of(impl))
    weights = weights_of(tensors)
    normal = F.layer_norm(
        tensors[0].double().movedim(1, -1), (12,), weights.norm_weight.double(), weights.norm_bias.double()
    ).movedim(-1, 1)[:, 4:8]
    output = mixer_stage(tensors[0], weights, training=True)
    torch.testing.assert_close(output.batch_mean, normal.mean((0, 2, 3)).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.batch_var, normal.var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=1e-6)
    assert not output.batch_mean.requires_grad
    output = mixer_stage(tensors[0], weights)
    assert torch.equal(output.batch_mean, weights.bn_mean) and torch.equal(output.batch_var, weights.bn_var)
    assert output.batch_var.data_ptr() != weights.bn_var.data_ptr()


def test_running_statistics_may_change_before_backward(impl):
    tensors = arguments(SMALL, device=device_of(impl))
    for training in (False, True):
        grads = []
        for change in (False, True):
            weights = weights_of(tensors)
            y = mixer_stage(tensors[0], weights, training=training).y
            if change:
                weights.bn_mean.add_(3)
                weights.bn_var.mul_(5)
            grads.append(torch.autograd.grad(y.square().sum(), tensors))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_pixel_statistics_are_refused(impl):
    tensors = arguments((1, 12, 1, 1, 2), device=device_of(impl))
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got shape \[1, 12, 1, 1\]"):
        mixer_stage(tensors[0], weights_of(tensors), training=True)
    assert mixer_stage(tensors[0], weights_of(tensors)).y.shape == (1, 12, 1, 1)


def remember(sizes, tensor):
    sizes.append(tensor.numel())
    return tensor


def test_what_is_kept(impl):
    """x, the weights and statistics that do not grow with the image."""
    small = 2 * 2 * (2 * 2 + 2) * 2 + 2 * 4 * 49 + 2 * 4 + 4 + 4
    for side in (6, 12):
        tensors = arguments((2, 12, side, side, 2), device=device_of(impl))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, sizes), lambda t: t):
            mixer_stage(tensors[0], weights_of(tensors), training=True)
        assert sum(sizes) == sum(t.numel() for t in tensors) + small


def test_weights_of_other_dtypes(impl):
    """Gradients come in the dtype of each weight."""
    x, *weights = (t.detach() for t in arguments(SMALL, device=device_of(impl)))
    mixed = [t.requires_grad_() for t in (x, *(w.to(torch.bfloat16) for w in weights))]
    expected = evaluate(partial(flat, reference), in_float64(mixed), training=True)
    results = evaluate(partial(flat, mixer_stage), mixed, training=True)
    for result, peer, argument in zip(results, expected, [mixed[0], *mixed], strict=True):
        assert result.dtype == argument.dtype
        assert relative_error(result, peer) < (1e-4 if result.dtype == torch.float32 else 4e-3)


def test_frozen_weights_and_input(impl):
    tensors = arguments(SMALL, device=device_of(impl))
    expected = torch.autograd.grad(flat(reference, *tensors).square().sum(), tensors)
    for chosen in ([0], [3], [1, 8, 19]):
        some = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(tensors)]
        grads = torch.autograd.grad(flat(mixer_stage, *some).square().sum(), [some[i] for i in chosen])
        for grad, i in zip(grads, chosen, strict=True):
            assert relative_error(grad, expected[i]) < 2e-5
    assert not flat(mixer_stage, *(t.detach() for t in tensors)).requires_grad


def test_second_derivatives_of_the_reference():
    tensors = arguments((1, 6, 3, 3, 1), torch.float64)
    with mirage_kernels.use("torch"):
        (grad,) = torch.autograd.grad(flat(mixer_stage, *tensors).square().sum(), tensors[:1], create_graph=True)
        grad.square().sum().backward()
    assert tensors[3].grad.norm() > 0

def test_errors_name_the_argument():
    tensors = arguments(SMALL)
    x, weights = tensors[0], weights_of(tensors)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions, got shape \[12, 5, 7\]"):
        mixer_stage(x[0], weights)
    with pytest.raises(ValueError, match=r"x: expected a positive multiple of 3 channels, got shape \[2, 11, 5, 7\]"):
        mixer_stage(x[:, 1:], weights)
    with pytest.raises(TypeError, match="weights: expected MixerWeights, got tuple"):
        mixer_stage(x, tuple(weights))
    for name, value in weights._asdict().items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            mixer_stage(x, weights._replace(**{name: value.unsqueeze(0)}))
        with pytest.raises(TypeError, match=f"{name}: expected float32, float64, float16 or bfloat16"):
            mixer_stage(x, weights._replace(**{name: value.long()}))
        with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu like x, got meta"):
            mixer_stage(x, weights._replace(**{name: value.to("meta")}))
    with pytest.raises(ValueError, match="temperature: expected a head count that divides 4 channels, got 3"):
        mixer_stage(x, weights._replace(temperature=torch.ones(3, 1, 1)))
    with pytest.raises(ValueError, match=r"branch_scale: expected shape \[2\]"):
        mixer_stage(x, weights, torch.ones(3))
