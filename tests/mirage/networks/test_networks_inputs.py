"""Images of any size, images that are none, and arguments that build no network."""

import pytest
import torch

from mirage import networks
from mirage.networks.common import pad_to_multiple
from mirage.restore import pad_to_multiple as of_restore

SMALL = {"dim": 4, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 1, 1]}
CASES = {
    "restormer": (SMALL, 8),
    "promptir": (SMALL, 8),
    "nafnet": ({"width": 2, "encoder_blocks": [1, 1, 1, 1], "middle_blocks": 1, "decoder_blocks": [1, 1, 1, 1]}, 16),
    "srresnet": ({"dim": 4, "num_blocks": 1, "upscale": 2}, 1),
}


@pytest.fixture(scope="module", params=CASES)
def network(request):
    torch.manual_seed(0)
    network = networks.create(request.param, **CASES[request.param][0]).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert network.multiple == CASES[request.param][1]
    return network


@pytest.mark.parametrize("size", [(16, 32), (13, 37), (3, 18), (1, 1)])
def test_any_size_is_padded_as_restoring_pads_and_cropped(network, size):
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    padded = of_restore(x, network.multiple)
    assert torch.equal(pad_to_multiple(x, network.multiple), padded)
    height, width = (side * network.scale for side in size)
    with torch.no_grad():
        y = network(x)
        assert y.shape == (2, 3, height, width)
        torch.testing.assert_close(y, network(padded)[..., :height, :width], rtol=1e-12, atol=1e-12)


def test_each_image_of_a_batch_is_by_itself(network):
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[1:2], network(x[1:2]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 16, 16), r"x must have the shape \[B, 3, H, W\] with B at least 1, got \(3, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16), r"got \(1, 4, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), "with B at least 1"),
        (torch.zeros(1, 3, 16, 0), "must be positive, got 16x0"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "floating-point dtype, got torch.int64"),
    ],
)
def test_images_that_are_none(network, x, message):
    with pytest.raises(ValueError, match=message):
        network(x)


def test_a_config_is_an_equal_network(network):
    again = type(network)(**network.config)
    assert again.config == network.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize("name", ["restormer", "promptir"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 5}, r"dim must be a positive multiple of 2"),
        ({"dim": "48"}, "dim must be an integer of at least 1, got '48'"),
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"out_channels": 1}, r"out_channels must equal in_channels \(3\)"),
        ({"num_blocks": [1, 1, 1]}, r"num_blocks must be 4 integers of at least 0, got \[1, 1, 1\]"),
        ({"num_blocks": 4}, "num_blocks must be 4 integers of at least 0, got 4"),
        ({"num_refinement_blocks": -1}, "num_refinement_blocks must be an integer of at least 0, got -1"),
        ({"heads": [1, 2, 4, 0]}, "heads must be 4 integers of at least 1"),
        ({"heads": [1, 3, 1, 1]}, r"dim \* 2 must be a positive multiple of 3 \(heads\[1\] = 3\), got 8"),
        ({"LayerNorm_type": "Bias"}, "norm must be one of WithBias, BiasFree, got 'Bias'"),
        ({"ffn_expansion_factor": 0.1}, r"dim \* ffn_expansion_factor must be at least 1, got 4 \* 0.1"),
    ],
)
def test_arguments_of_restormer_and_promptir(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.create(name, **{**SMALL, **arguments})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("promptir", {"decoder": False}, "decoder must be True"),
        ("promptir", {**SMALL, "heads": [1, 1, 16, 1]}, r"features and prompt together must be .*16"),
        ("nafnet", {"width": 3}, "width must be a positive multiple of 2"),
        ("nafnet", {"enc_blk_nums": [1, 1], "dec_blk_nums": [1]}, "decoder_blocks must be 2 integers of at least 0"),
        ("nafnet", {"encoder_blocks": 2}, "encoder_blocks must be a sequence of integers of at least 0, got 2"),
        ("nafnet", {"middle_blk_num": -1}, "middle_blocks must be an integer of at least 0, got -1"),
        ("nafnet", {"padding": "edge"}, "padding must be one of reflect, zeros, got 'edge'"),
    ],
)
def test_arguments_of_the_others(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.create(name, **arguments)


def test_bias_free_norms_see_no_mean_and_others_do():
    """A constant added to all channels of a pixel changes what the bias-free norm gives, and not the other."""
    from mirage.blocks import LayerNorm
    from mirage.networks.restormer import BiasFreeLayerNorm

    x = torch.rand(1, 6, 3, 4, dtype=torch.float64)
    free, biased = BiasFreeLayerNorm(6).double(), LayerNorm(6).double()
    with torch.no_grad():
        torch.testing.assert_close(biased(x + 3), biased(x), rtol=1e-9, atol=1e-9)
        deviation = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(free(x + 3), (x + 3) / deviation, rtol=1e-9, atol=1e-9)
    assert list(free.state_dict()) == ["body.weight"]


def test_a_new_nafnet_changes_little():
    """Blocks start as the identity: beta and gamma are 0."""
    torch.manual_seed(0)
    block = networks.nafnet.NAFBlock(4)
    x = torch.rand(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(block(x), x)
