"""mirage.fast on the networks of their authors' own code, where checkouts of it are named.

    MIRAGE_RELEASED_NETWORKS=path pytest tests/mirage/networks/test_networks_fast_released.py

In that folder lie checkouts by the names of their repositories: ``Restormer`` (swz30), ``PromptIR`` (va1shn9v),
``AdaIR`` (c-yn), ``MoCE-IR`` (eduardzamfir) and ``NAFNet`` (megvii-research); a test skips where its own is absent.
"""

import contextlib
import copy
import os
import warnings

import numpy as np
import pytest
import torch
from golden import golden_file, load_golden_weights, noise_of, relative_error
from torch import nn

import mirage.fast
from mirage.networks import published

FOLDER = os.environ.get("MIRAGE_RELEASED_NETWORKS")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="MIRAGE_RELEASED_NETWORKS names no folder with checkouts")

ONES = {"num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}
SMALL = {**ONES, "dim": 16, "heads": [1, 2, 2, 4]}
MOCE_IR = {"dim": 16, "num_blocks": [1, 1, 1, 1], "num_dec_blocks": [1, 1, 1], "num_refinement_blocks": 1}
NAFNET = {"width": 8, "enc_blk_nums": [1, 2, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 0, 2]}
CASES = {
    "Restormer": ("restormer", {**SMALL, "num_blocks": [2, 1, 1, 2]}),
    "Restormer, bias-free norms": ("restormer", {**SMALL, "LayerNorm_type": "BiasFree"}),
    "Restormer, biases": ("restormer", {**SMALL, "bias": True, "ffn_expansion_factor": 2}),
    "Restormer, dual pixels": ("restormer", {**SMALL, "inp_channels": 6, "out_channels": 3, "dual_pixel_task": True}),
    "PromptIR": ("promptir", ONES),
    "AdaIR": ("adair", SMALL),
    "MoCE-IR": ("moce-ir-s", MOCE_IR),
    "MoCE-IR, biases": ("moce-ir-s", {**MOCE_IR, "bias": True, "LayerNorm_type": "BiasFree", "topk": 2}),
    "NAFNet": ("nafnet", NAFNET),
}


def accelerated(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing was recognised: in another test
        return mirage.fast.accelerate(copy.deepcopy(network))


@pytest.fixture(scope="module", params=CASES)
def network(request):
    """A published network with every weight off its initial value. Tests take copies."""
    name, arguments = CASES[request.param]
    if problem := published.missing(name, FOLDER):
        pytest.skip(problem)
    torch.manual_seed(0)
    network = published.create(name, FOLDER, **arguments)
    network.channels = arguments.get("inp_channels", 3)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.2 if parameter.ndim == 1 or parameter.shape[0] == 1 else 0.3 * parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    return network


@contextlib.contextmanager
def throughout(dtype):
    """MoCE-IR takes its Fourier transforms and adds up its experts in float32, whatever it is in itself. In float64 it
    does all of it there, so that mistakes are seen, and not what its own rounding makes of other roundings."""
    if dtype != torch.float64:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def image(network, batch=1, size=(16, 24)):
    return torch.rand(batch, network.channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def restored(network, x):
    torch.manual_seed(5)  # MoCE-IR's routing draws noise, in evaluation too
    with torch.no_grad(), throughout(x.dtype):
        return network(x)


def test_inference_is_that_of_the_original(network):
    """float64 shows mistakes, float32 what is lost by another order of sums: not more than the original loses."""
    original = copy.deepcopy(network).double().eval()
    x = image(network)
    fast, truth = accelerated(original), restored(original, x)
    assert relative_error(restored(fast, x), truth) <= 1e-12
    assert torch.equal(restored(mirage.fast.revert(fast), x), truth)

    original = original.float()
    error = relative_error(restored(original, x.float()), truth)
    assert relative_error(restored(accelerated(original), x.float()), truth) <= 2 * error + 1e-7


def test_nothing_that_is_recognised_is_left_as_it_was(network):
    summary = mirage.fast.summary(accelerated(network))
    assert not summary.kept and not summary.called


def step(network, x):
    """Output, gradient of the image, and those of the parameters by name."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    with throughout(x.dtype):
        y = network(x)
    (y.square().mean() + 0.01 * getattr(network, "total_loss", 0)).backward()
    return y.detach(), x.grad, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def flat(gradients):
    return torch.cat([gradient.flatten().double() for gradient in gradients.values()])


def test_a_step_of_training_is_that_of_the_original(network):
    original = copy.deepcopy(network).double().train()
    x = image(network, batch=2)
    fast = accelerated(original)
    (y, x_grad, gradients), state = step(fast, x), torch.get_rng_state()
    expected, expected_x_grad, expected_gradients = step(original, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(y, expected) <= 1e-12
    assert relative_error(x_grad, expected_x_grad) <= 1e-9
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.norm().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        difference = (gradients[name] - gradient).norm().item()
        assert difference <= 1e-8 * max(gradient.norm().item(), 1e-4 * largest), name

    original = copy.deepcopy(network).train()
    results = [step(model, x.float()) for model in (original, accelerated(original))]
    truth = flat(expected_gradients)
    (error, x_error), (fast_error, fast_x_error) = (
        (relative_error(flat(parameters), truth), relative_error(grad, expected_x_grad))
        for _, grad, parameters in results
    )
    assert fast_error <= 2 * error and fast_x_error <= 2 * x_error


def test_memory_fast_gives_the_same_gradients(network):
    original = copy.deepcopy(network).double().train()
    x = image(network, batch=2)
    fast = mirage.fast.accelerate(copy.deepcopy(original), memory="fast")
    assert relative_error(flat(step(fast, x)[2]), flat(step(original, x)[2])) <= 1e-9


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-7), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_adair_at_a_size_that_has_low_frequencies(dtype, limit):
    """Its module of frequencies alone, as the authors' code computed it in float64: one frequency to either side in one
    direction, two in the other. In float32 gradients are those of magnitudes near zero, as in the authors' code."""
    if problem := published.missing("adair", FOLDER):
        pytest.skip(problem)
    with np.load(golden_file("adair_fremodule.npz")) as data:
        expected = {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}
    released = type(published.create("adair", FOLDER, **SMALL).fre1)(16, num_heads=4, bias=False)
    module = mirage.fast.accelerate(nn.Sequential(load_golden_weights(released).to(dtype)))[0]
    assert type(module) is mirage.fast.FrequencyModule
    shape = tuple(expected["features_shape"].tolist())
    features, weights = (
        torch.from_numpy(noise_of(f"adair_fremodule.{name}", shape)).float().to(dtype)
        for name in ("features", "grad_output")
    )
    image = expected["image"].to(dtype).requires_grad_()
    seen = {}
    for name in ("channel_cross_l", "channel_cross_h", "frequency_refine", "channel_cross_agg"):
        module.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output.detach()})
        )
    features.requires_grad_()
    seen["output"] = module(image, features)
    seen["output"].backward(weights)
    seen["grad_features"] = features.grad
    for name, value in seen.items():
        samples = value.detach().flatten()[expected[f"feature_index.{name}"]]
        assert relative_error(samples, expected[f"feature_samples.{name}"]) <= limit, name
        assert relative_error(value.detach().double().norm(), expected[f"feature_norm.{name}"]) <= limit, name
    assert relative_error(image.grad, expected["grad_image"]) <= 10 * limit
    for name, parameter in module.named_parameters():
        norm = expected[f"grad_norm.{name}"]
        if parameter.grad is None:
            assert norm == 0, name
            continue
        direction = torch.from_numpy(noise_of(f"grad.{name}", tuple(parameter.shape)))
        assert relative_error(parameter.grad.double().norm(), norm) <= 10 * limit, name
        assert (
            (parameter.grad.double() * direction).sum() - expected[f"grad_dot.{name}"]
        ).abs() <= 10 * limit * norm, name
