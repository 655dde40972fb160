"""Our networks and spandrel's classes restore the same by the same weights, and so do its classes accelerated."""

import warnings

import pytest
import torch
from golden import load_golden_weights, relative_error

import mirage.fast
from mirage import networks

spandrel = pytest.importorskip("spandrel")

RESTORMER = {"dim": 16, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 2, 2, 4]}
NAFNET = {"width": 8, "encoder_blocks": [1, 1, 1, 1], "middle_blocks": 1, "decoder_blocks": [1, 1, 1, 1]}
CASES = {
    "Restormer": ("restormer", RESTORMER),
    "Restormer, bias-free norms": ("restormer", {**RESTORMER, "norm": "BiasFree"}),
    "Restormer, biases": ("restormer", {**RESTORMER, "bias": True}),
    "NAFNet": ("nafnet", {**NAFNET, "padding": "zeros"}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """Our network with weights off their initial values, and what spandrel makes of its state dict."""
    name, arguments = CASES[request.param]
    ours = load_golden_weights(networks.create(name, **arguments)).eval()
    registry = spandrel.MAIN_REGISTRY.copy()
    if name == "restormer":
        registry.add(*pytest.importorskip("spandrel_extra_arches").EXTRA_REGISTRY)
    descriptor = spandrel.ModelLoader(registry=registry).load_from_state_dict(ours.state_dict())
    assert descriptor.architecture.id == type(ours).__name__ and not isinstance(descriptor.model, type(ours))
    return ours, descriptor


def image(height, width):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def output(network, x):
    with torch.no_grad():
        return network.eval()(x)


def test_both_restore_the_same(pair):
    ours, descriptor = pair
    x = image(32, 48)
    assert relative_error(output(descriptor.model, x), output(ours, x)) < 1e-5


def test_both_pad_the_same(pair):
    """spandrel's call pads Restormer's images by reflection; NAFNet's own code pads by zeros."""
    ours, descriptor = pair
    x = image(29, 37)
    assert relative_error(descriptor(x), output(ours, x).clamp(0, 1)) < 1e-5


def test_weights_go_back_and_forth(pair):
    ours, descriptor = pair
    overrides = {"padding": "zeros"} if isinstance(ours, networks.NAFNet) else {}
    again = networks.load(descriptor.model.state_dict(), **overrides)
    assert again.config == ours.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_accelerated_it_restores_the_same(pair):
    """In float64, where another order of sums is no excuse, and whatever of it is replaced."""
    _, descriptor = pair
    x = image(32, 48).double()
    model = descriptor.model.double()
    reference = output(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of networks in which nothing is recognised
        assert mirage.fast.accelerate(model) is model
    assert relative_error(output(model, x), reference) < 1e-12
    assert torch.equal(output(mirage.fast.revert(model), x), reference)
