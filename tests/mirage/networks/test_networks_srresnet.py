"""SRResNet: names and counts of the published network, both sizes, and the features of the descriptor."""

import pytest
import torch
import torch.nn.functional as F

from mirage import networks

CONVOLUTIONS = ["conv_first", "upconv1", "upconv2", "conv_hr", "conv_last"]


def small(**arguments):
    torch.manual_seed(0)
    network = networks.create("srresnet", **{"dim": 6, "num_blocks": 2, **arguments})
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return network.double()


def image(channels=3, size=(9, 7)):
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(network, x, upscale):
    """What the publications say, of the state dict alone."""
    w = network.state_dict()

    def conv(name, y):
        return F.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    def leaky(y):
        return torch.where(y > 0, y, 0.1 * y)

    y = leaky(conv("conv_first", x))
    for i in range(2):
        y = y + conv(f"body.{i}.conv2", conv(f"body.{i}.conv1", y).clamp_min(0))
    steps = {1: [], 2: [("upconv1", 2)], 3: [("upconv1", 3)], 4: [("upconv1", 2), ("upconv2", 2)]}[upscale]
    for name, factor in steps:
        y = conv(name, y)
        batch, channels, height, width = y.shape
        y = y.reshape(batch, channels // factor**2, factor, factor, height, width).permute(0, 1, 4, 2, 5, 3)
        y = leaky(y.reshape(batch, channels // factor**2, height * factor, width * factor))
    before = conv("conv_hr", y)
    return before, conv("conv_last", leaky(before))


@pytest.mark.parametrize(("upscale", "parameters"), [(4, 1_517_571), (1, 1_222_147)])
def test_parameters_are_those_of_the_publications(upscale, parameters):
    with torch.device("meta"):
        network = networks.create("srresnet", upscale=upscale)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_names_are_the_published_ones():
    with torch.device("meta"):
        state = networks.create("srresnet").state_dict()
    blocks = [f"body.{i}.conv{j}" for i in range(16) for j in (1, 2)]
    expected = {f"{name}.{leaf}" for name in CONVOLUTIONS + blocks for leaf in ("weight", "bias")}
    assert set(state) == expected
    assert state["upconv2.weight"].shape == (256, 64, 3, 3) and state["conv_last.weight"].shape == (3, 64, 3, 3)
    with torch.device("meta"):
        assert networks.create("srresnet", upscale=3).state_dict()["upconv1.weight"].shape == (576, 64, 3, 3)


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("residual", [True, False])
def test_output_and_features_are_what_the_weights_say(upscale, residual):
    network, x = small(upscale=upscale, global_residual=residual), image()
    before, expected = by_hand(network, x, upscale)
    if residual:
        expected = expected + F.interpolate(x, scale_factor=upscale, mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert network(x).shape == (2, 3, 9 * upscale, 7 * upscale) and network.scale == upscale
        torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(network.features(x, activated=False), before.flatten(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(network.features(x), F.leaky_relu(before, 0.1).flatten(1), rtol=1e-12, atol=1e-12)
        assert network.features(x).shape == (2, 6 * 63 * upscale**2)
        assert network.feature_maps(x).shape == (2, 6, 9 * upscale, 7 * upscale)


def test_the_last_convolution_does_not_change_the_features():
    network, x = small(upscale=2), image()
    with torch.no_grad():
        features = network.features(x)
        network.conv_last.weight.zero_()
        assert torch.equal(network.features(x), features)


def test_arguments_of_published_configurations():
    network = networks.create(
        "SRResNet", num_in_ch=1, num_out_ch=1, num_feat=5, num_block=3, upscale=2, global_residual=False
    )
    assert network.config == {
        "in_channels": 1, "out_channels": 1, "dim": 5, "num_blocks": 3, "upscale": 2, "global_residual": False
    }  # fmt: skip
    assert type(network)(**network.config).state_dict().keys() == network.state_dict().keys()


def test_it_starts_near_its_residual():
    torch.manual_seed(0)
    network, x = networks.create("srresnet", dim=16, num_blocks=4, upscale=1), torch.rand(1, 3, 16, 16)
    weight = network.body[0].conv1.weight
    assert weight.std().item() == pytest.approx(0.1 * (2 / (16 * 9)) ** 0.5, rel=0.05)
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        assert (network(x) - x).abs().max() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upscale": 8}, "upscale must be one of 1, 2, 3, 4, got 8"),
        ({"out_channels": 1}, r"out_channels must equal in_channels \(3\).*got 1; global_residual=False"),
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"num_blocks": 1.5}, "num_blocks must be an integer of at least 0, got 1.5"),
        ({"width": 4}, "srresnet has no argument 'width'; there are: in_channels, "),
        ({"dim": 4, "num_feat": 4}, "dim: given twice, also as 'num_feat'"),
    ],
)
def test_arguments_that_fit_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.create("srresnet", **arguments)


def test_unknown_names():
    with pytest.raises(ValueError, match="name: expected one of .*srresnet.*, got 'srgan'"):
        networks.create("srgan")
    assert "srresnet" in networks.names() and networks.names() == sorted(networks.names())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 8, 8), r"x must have the shape \[B, 3, H, W\] with B at least 1, got \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"got \(1, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "with B at least 1"),
        (torch.zeros(1, 3, 0, 8), "must be positive, got 0x8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating-point dtype, got torch.uint8"),
    ],
)
def test_bad_images(x, message):
    network = small()
    for call in (network, network.features):
        with pytest.raises(ValueError, match=message):
            call(x)
