"""Files of other networks where MIRAGE's are taken: `Restorer`, the command line, evaluation, the fast modules."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mirage
import mirage.fast
from mirage import networks
from mirage.restore import Restorer
from mirage.restore.budget import network_memory
from mirage.restore.tiles import restore_tiles

RESTORMER = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 2, 2]}
NAFNET = {"width": 4, "encoder_blocks": [1, 1, 1, 1], "middle_blocks": 1, "decoder_blocks": [1, 1, 1, 1]}
SRRESNET = {"dim": 6, "num_blocks": 1, "upscale": 1}
CASES = {
    "restormer": RESTORMER,
    "biasfree": {**RESTORMER, "norm": "BiasFree"},
    "promptir": {**RESTORMER, "dim": 4},
    "nafnet": NAFNET,
    "srresnet": SRRESNET,
}
cases = pytest.mark.parametrize("case", CASES)


def build(case, **more):
    torch.manual_seed(0)
    name = "restormer" if case == "biasfree" else case
    network = networks.create(name, **{**CASES[case], **more}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def saved(network, folder, name="weights.pth"):
    torch.save({"params": network.state_dict()}, folder / name)
    return folder / name


def photo(height=21, width=38, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@torch.no_grad()
def directly(network, pixels):
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    return (network(x)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def close(restored, expected):
    return np.abs(restored.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fast", [True, False])
@cases
def test_one_pass_is_the_network(tmp_path, case, fast):
    """Of sizes that are multiples of nothing, and of one side smaller than what NAFNet pads."""
    network = build(case)
    restorer = Restorer(saved(network, tmp_path), device="cpu", fast=fast)
    for pixels in (photo(), photo(5, 17)):
        expected = directly(network, pixels)
        assert close(restorer(pixels), expected)
    assert not close(expected, pixels)


@cases
def test_tiles_are_those_of_the_network(tmp_path, case):
    network, pixels = build(case), photo(70, 90)
    restored = Restorer(saved(network, tmp_path), device="cpu", tile=48, overlap=16)(pixels)
    assert restored.shape == pixels.shape and restored.dtype == np.uint8
    whole = directly(network, pixels)
    assert np.array_equal(
        restore_tiles(network, pixels, tile=96, overlap=16), restore_tiles(network, pixels, tile=512, overlap=0)
    )
    assert close(restore_tiles(network, pixels, tile=96, overlap=16), whole)
    if case == "srresnet":  # which sees 5 pixels around each
        assert close(restored, whole)


def test_tiles_are_multiples_of_what_the_network_takes():
    sizes = []
    network = build("nafnet")
    network.register_forward_hook(lambda m, inputs, out: sizes.append(tuple(inputs[0].shape[-2:])))
    restore_tiles(network, photo(90, 120), tile=72, overlap=8)
    assert sizes and all(side % 16 == 0 and side <= 64 for size in sizes for side in size)


def test_grey_networks(tmp_path):
    network = build("restormer", in_channels=1)
    restorer = Restorer(saved(network, tmp_path), device="cpu")
    grey = photo(channels=1)
    assert close(restorer(grey), directly(network, grey))
    assert close(restorer(grey[..., 0]), directly(network, grey)[..., 0])
    assert close(Restorer(network, device="cpu", tile=16, overlap=0)(grey[:16, :16]), directly(network, grey[:16, :16]))
    with pytest.raises(ValueError, match="the network restores grey images alone, this one has colours"):
        restorer(photo())


def test_alpha_is_kept(tmp_path):
    network, pixels = build("nafnet"), photo(channels=4)
    pixels[..., 3] = np.maximum(pixels[..., 3], 1)
    restored = Restorer(saved(network, tmp_path), device="cpu")(pixels)
    assert np.array_equal(restored[..., 3], pixels[..., 3])
    assert close(restored[..., :3], directly(network, pixels[..., :3]))


@pytest.mark.parametrize("attention", ["local", "global"])
@cases
def test_modes_of_mirage_alone(tmp_path, case, attention):
    network = build(case)
    message = f"attention: {attention} is for MIRAGE alone, got {type(network).__name__}; expected auto, whole or tile"
    for weights in (network, saved(network, tmp_path)):
        with pytest.raises(ValueError, match=message):
            Restorer(weights, device="cpu", attention=attention)


@pytest.mark.parametrize(
    ("case", "arguments", "message"),
    [
        ("srresnet", {"upscale": 2}, "has the size of its image, got SRResNet for x2 super-resolution"),
        ("restormer", {"in_channels": 6, "dual_pixel_task": True}, "got Restormer from 6 to 3 channels"),
        ("srresnet", {"out_channels": 1, "global_residual": False}, "got SRResNet from 3 to 1 channels"),
    ],
)
def test_networks_that_restore_no_photograph(tmp_path, case, arguments, message):
    with pytest.raises(ValueError, match=message):
        Restorer(saved(build(case, **arguments), tmp_path), device="cpu")


@cases
def test_memory_is_known_and_follows_pixels_and_channels(case):
    network = build(case)
    name = next(name for name in ("dim", "width") if name in network.config)
    wide = type(network)(**{**network.config, name: 2 * network.config[name]})
    one = network_memory(network, 10_000)
    assert one > 10_000 * network.config[name] * 4 * 3
    assert network_memory(network, 20_000) == 2 * one and network_memory(wide, 10_000) > 1.5 * one


def test_an_image_beyond_the_memory_is_refused_with_what_to_do(tmp_path):
    restorer = Restorer(saved(build("restormer"), tmp_path), device="cpu", memory="600M")
    with pytest.raises(ValueError, match=r"not enough memory: 4000x3000 .*attention tile needs less"):
        restorer(np.zeros((3000, 4000, 3), np.uint8))


@pytest.mark.filterwarnings("ignore:accelerate. nothing")
@cases
def test_accelerate_leaves_what_it_computes(case):
    network, x = build(case), torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        expected = network(x)
        fast = mirage.fast.accelerate(network)
        replaced = list(mirage.fast.summary(fast).replaced.values())
        assert (fast(x) - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(mirage.fast.revert(fast)(x), expected)
    if case in ("restormer", "promptir"):
        norms = sum(type(module) is mirage.blocks.LayerNorm for module in network.modules())
        assert replaced.count("LayerNorm") == norms > 0


def test_command_line(tmp_path):
    pytest.importorskip("imagecodecs")
    from PIL import Image

    from mirage.cli import main

    network, pixels = build("nafnet"), photo()
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    weights = saved(network, tmp_path)
    run = CliRunner().invoke(
        main, ["restore", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--weights", str(weights)]
    )
    assert run.exit_code == 0, run.output
    assert close(np.asarray(Image.open(tmp_path / "out" / "a.png")), directly(network, pixels))
    run = CliRunner().invoke(
        main,
        [
            "restore",
            str(tmp_path / "in"),
            "-o",
            str(tmp_path / "o"),
            "--weights",
            str(weights),
            "--attention",
            "global",
        ],
    )
    assert run.exit_code == 1 and "attention: global is for MIRAGE alone, got NAFNet" in run.output
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
    run = CliRunner().invoke(
        main, ["restore", str(tmp_path / "in"), "-o", str(tmp_path / "o"), "--weights", str(tmp_path / "other.pth")]
    )
    assert run.exit_code == 1 and "none of the networks that are known" in run.output


def test_evaluation(tmp_path):
    from mirage.evaluate.methods import Network

    network, pixels = build("restormer"), photo().astype(np.float32) / 255
    method = Network(saved(network, tmp_path), "Restormer", device="cpu")
    with torch.no_grad():
        expected = network(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(method(pixels) - expected.clip(0, 1)).max() < 1e-4
    assert method.label == "Restormer" and "weights.pth" in method.definition


def test_mirage_is_still_mirage(tmp_path):
    torch.save(
        {"state_dict": {f"net.{k}": v for k, v in mirage.mirage_tiny().state_dict().items()}}, tmp_path / "t.ckpt"
    )
    assert isinstance(Restorer(tmp_path / "t.ckpt", device="cpu", attention="global").model, mirage.MIRAGE)
