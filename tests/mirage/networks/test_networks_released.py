"""The networks beside the code that their authors published, where checkouts of it are named.

    MIRAGE_RELEASED_NETWORKS=path pytest tests/mirage/networks/test_networks_released.py

In that folder lie checkouts by the names of their repositories: ``Restormer`` (swz30), ``PromptIR`` (va1shn9v),
``NAFNet`` (megvii-research) and ``BasicSR`` (XPixelGroup); a test skips where its own is absent. Restormer and PromptIR
need einops. What else they import and does not take part in the network is replaced.
"""

import os

import pytest
import torch
from golden import relative_error

from mirage import networks
from mirage.networks import published

FOLDER = os.environ.get("MIRAGE_RELEASED_NETWORKS")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="MIRAGE_RELEASED_NETWORKS names no folder with checkouts")

SMALL = {"dim": 16, "num_blocks": [1, 1, 2, 1], "num_refinement_blocks": 1, "heads": [1, 2, 2, 4]}
LEVELS = {"width": 8, "enc_blk_nums": [1, 2, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 0, 2]}
SIDD = {"width": 32, "enc_blk_nums": [2, 2, 4, 8], "middle_blk_num": 12, "dec_blk_nums": [2, 2, 2, 2]}
GOPRO = {"width": 64, "enc_blk_nums": [1, 1, 1, 28], "middle_blk_num": 1, "dec_blk_nums": [1, 1, 1, 1]}
DUAL_PIXEL = {**SMALL, "inp_channels": 6, "out_channels": 3, "dual_pixel_task": True}


@pytest.fixture(scope="module")
def kinds():
    """The published class of a network by our name."""

    def kind_of(name):
        if problem := published.missing(name, FOLDER):
            pytest.skip(problem)
        return published.class_of(name, FOLDER)

    return kind_of


def pair(kinds, name, arguments, ours=None):
    """The published network and ours with the same weights, every one off its initial value, in float64."""
    torch.manual_seed(0)
    published = kinds(name)(**arguments)
    with torch.no_grad():
        for parameter in published.parameters():
            scale = 0.2 if parameter.ndim == 1 or parameter.shape[0] == 1 else parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    network = networks.create(name, **{**arguments, **(ours or {})})
    assert set(network.state_dict()) == set(published.state_dict())
    network.load_state_dict(published.state_dict(), strict=True)
    return published.double(), network.double()


def image(channels=3, size=(32, 48)):
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("restormer", SMALL, (32, 48)),
        ("restormer", {**SMALL, "LayerNorm_type": "BiasFree", "ffn_expansion_factor": 2}, (16, 24)),
        ("restormer", {**SMALL, "bias": True, "inp_channels": 1, "out_channels": 1}, (16, 24)),
        ("restormer", DUAL_PIXEL, (16, 24)),
        ("restormer", {**DUAL_PIXEL, "bias": True}, (16, 16)),
        ("promptir", {"num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "decoder": True}, (16, 24)),
        ("nafnet", LEVELS, (16, 24)),
        ("nafnet", {**LEVELS, "img_channel": 1, "middle_blk_num": 0}, (8, 16)),
        ("nafnet", {"width": 4}, (7, 5)),
        ("srresnet", {"num_feat": 8, "num_block": 2, "upscale": 2}, (9, 11)),
        ("srresnet", {"num_feat": 8, "num_block": 2, "upscale": 3}, (9, 11)),
        ("srresnet", {"num_feat": 8, "num_block": 2, "num_in_ch": 1, "num_out_ch": 1}, (9, 11)),
    ],
)
def test_a_step_is_that_of_the_published_network(kinds, name, arguments, size):
    """Output, and gradients of the image and of all parameters."""
    ours = {"middle_blk_num": 1, "enc_blk_nums": [], "dec_blk_nums": []} if arguments == {"width": 4} else None
    published, network = pair(kinds, name, arguments, ours)
    channels = network.config["in_channels"]
    results = []
    for model in (published, network):
        x = image(channels, size).requires_grad_()
        y = model(x)
        y.square().mean().backward()
        results.append((y, x.grad))
    (expected, expected_gradient), (restored, gradient) = results
    assert relative_error(restored, expected) <= 1e-12
    assert relative_error(gradient, expected_gradient) <= 1e-9
    peers = dict(network.named_parameters())
    largest = max(p.grad.norm().item() for p in published.parameters() if p.grad is not None)
    for key, parameter in published.named_parameters():
        if parameter.grad is None:
            assert peers[key].grad is None, key
            continue
        difference = (peers[key].grad - parameter.grad).norm().item()
        assert difference <= 1e-8 * max(parameter.grad.norm().item(), 1e-4 * largest), key


@pytest.mark.parametrize("size", [(9, 11), (1, 17), (23, 8)])
def test_zero_padding_is_that_of_the_published_nafnet(kinds, size):
    published, network = pair(kinds, "nafnet", LEVELS, {"padding": "zeros"})
    with torch.no_grad():
        expected = published(image(size=size))
        assert relative_error(network(image(size=size)), expected) <= 1e-12
        network.config["padding"] = "reflect"
        assert relative_error(network(image(size=size)), expected) > 1e-3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("restormer", {}),
        ("promptir", {"decoder": True}),
        ("nafnet", SIDD),
        ("nafnet", GOPRO),
        ("srresnet", {}),
    ],
)
def test_the_published_sizes_have_the_same_names_and_shapes(kinds, name, arguments):
    with torch.device("meta"):
        published, network = kinds(name)(**arguments), networks.create(name, **arguments)
    expected = {key: value.shape for key, value in published.state_dict().items()}
    assert {key: value.shape for key, value in network.state_dict().items()} == expected


def test_the_published_start_of_srresnet(kinds):
    """The scale of initial weights, which a trainer begins with."""
    torch.manual_seed(0)
    published, network = kinds("srresnet")(num_block=4), networks.create("srresnet", num_blocks=4)
    for (key, parameter), peer in zip(published.named_parameters(), network.parameters(), strict=True):
        if key.endswith("bias"):
            assert not parameter.any() and not peer.any()
        else:
            assert peer.std().item() == pytest.approx(parameter.std().item(), rel=0.1), key
