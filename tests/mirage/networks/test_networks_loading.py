"""Which network a file is of, and how it was built, told from names and shapes; wrapped files; files of others."""

import json
from collections import OrderedDict

import pytest
import safetensors.torch
import torch

import mirage
from mirage import networks
from mirage.checkpoint import CheckpointError, CheckpointWarning
from mirage.networks.loading import NETWORK_KEY

RESTORMER = {"dim": 8, "num_blocks": [1, 2, 1, 3], "num_refinement_blocks": 2, "heads": [1, 2, 4, 2]}
PROMPTIR = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 2, 2]}
NAFNET = {"width": 4, "encoder_blocks": [1, 2, 0], "middle_blocks": 3, "decoder_blocks": [0, 1, 1]}
SRRESNET = {"dim": 6, "num_blocks": 3, "upscale": 2}

CASES = [
    ("restormer", RESTORMER),
    ("restormer", {**RESTORMER, "norm": "BiasFree", "ffn_expansion_factor": 2.0}),
    ("restormer", {**RESTORMER, "bias": True, "in_channels": 1}),
    ("restormer", {**RESTORMER, "in_channels": 6, "dual_pixel_task": True}),
    ("restormer", {**RESTORMER, "num_blocks": [0, 1, 1, 1], "num_refinement_blocks": 0, "heads": [1, 1, 1, 1]}),
    ("promptir", PROMPTIR),
    ("promptir", {**PROMPTIR, "num_blocks": [1, 1, 0, 1], "norm": "BiasFree"}),
    ("nafnet", NAFNET),
    ("nafnet", {"width": 3, "encoder_blocks": [], "middle_blocks": 1, "decoder_blocks": [], "in_channels": 1}),
    ("srresnet", {**SRRESNET, "upscale": 1}),
    ("srresnet", SRRESNET),
    ("srresnet", {**SRRESNET, "upscale": 3, "in_channels": 1}),
    ("srresnet", {**SRRESNET, "upscale": 4, "out_channels": 1, "global_residual": False}),
]
cases = pytest.mark.parametrize(("name", "arguments"), CASES)


def build(name, arguments):
    torch.manual_seed(0)
    network = networks.create(name, **arguments).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def same_weights(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@cases
def test_the_network_and_its_arguments_are_told_from_its_weights(name, arguments):
    network = build(name, arguments)
    found = networks.identify(network.state_dict())
    assert found.name == name and not found.problems
    assert type(network)(**found.arguments).config == network.config
    loaded = networks.load(network.state_dict())
    assert type(loaded) is type(network) and loaded.config == network.config
    assert same_weights(loaded, network) and not loaded.training
    x = torch.rand(1, network.config["in_channels"], 13, 10)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("factor", [2.66, 2, 1.5, 3.125, 2.6639])
def test_an_expansion_is_one_with_the_same_widths(factor):
    found = networks.identify(build("restormer", {**RESTORMER, "ffn_expansion_factor": factor}).state_dict())
    widths = [int(8 * 2**i * factor) for i in range(4)]
    assert [int(8 * 2**i * found.arguments["ffn_expansion_factor"]) for i in range(4)] == widths


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"params": s},
        lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"generator": {"net_g": OrderedDict(s)}},
        lambda s: {"state_dict": {**{f"net.{k}": v for k, v in s.items()}, "loss.weight": torch.zeros(3)}},
    ],
)
@pytest.mark.parametrize(("name", "arguments"), [CASES[0], CASES[5], CASES[7], CASES[10]])
def test_wrapped_files(tmp_path, name, arguments, wrap):
    network = build(name, arguments)
    torch.save(wrap(network.state_dict()), tmp_path / "weights.pth")
    assert same_weights(networks.load(tmp_path / "weights.pth"), network)
    assert networks.load(tmp_path / "weights.pth").config == network.config


def test_averaged_weights_are_preferred_and_others_can_be_asked_for(tmp_path):
    network = build("nafnet", NAFNET)
    averaged = {key: value * 0.5 for key, value in network.state_dict().items()}
    torch.save({"params": network.state_dict(), "params_ema": averaged}, tmp_path / "a.pth")
    with pytest.warns(CheckpointWarning, match=r"others: mirage.networks.load\(.*key='params'"):
        loaded = networks.load(tmp_path / "a.pth")
    assert torch.equal(loaded.intro.weight, network.intro.weight * 0.5)
    assert same_weights(networks.load(tmp_path / "a.pth", key="params"), network)
    with pytest.raises(CheckpointError, match="nothing at 'generator'.*mirage.networks.load"):
        networks.load(tmp_path / "a.pth", key="generator")


@cases
def test_files_of_our_own_say_all_arguments(tmp_path, name, arguments):
    network = build(name, arguments)
    networks.save(network, tmp_path / "own.safetensors")
    with safetensors.safe_open(tmp_path / "own.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[NETWORK_KEY]) == {"name": name, "arguments": network.config}
    loaded = networks.load(tmp_path / "own.safetensors")
    assert loaded.config == network.config and same_weights(loaded, network)


def test_what_no_weight_tells_is_stored_or_given(tmp_path):
    network = build("srresnet", {**SRRESNET, "global_residual": False})
    networks.save(torch.nn.DataParallel(network), tmp_path / "own.safetensors")
    torch.save(network.state_dict(), tmp_path / "other.pth")
    assert networks.load(tmp_path / "own.safetensors").config["global_residual"] is False
    assert networks.load(tmp_path / "other.pth").config["global_residual"] is True
    assert networks.load(tmp_path / "other.pth", global_residual=False).config == network.config
    assert networks.load(build("nafnet", NAFNET).state_dict(), padding="zeros").padding == "zeros"
    with pytest.raises(ValueError, match="srresnet has no argument 'padding'"):
        networks.load(tmp_path / "other.pth", padding="zeros")


def test_weights_of_other_dtypes_come_as_float32():
    state = {key: value.half() for key, value in build("nafnet", NAFNET).state_dict().items()}
    loaded = networks.load(state)
    assert loaded.intro.weight.dtype == torch.float32
    assert torch.equal(loaded.intro.weight, state["intro.weight"].float())


def mirage_network(dim=24):
    return mirage.MIRAGE(dim=dim, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1)


@pytest.mark.parametrize("prefix", ["", "net.", "module."])
def test_a_file_of_mirage_is_mirages(tmp_path, prefix):
    """Whose names are Restormer's, and more."""
    tiny = mirage.mirage_tiny()
    torch.save({"state_dict": {prefix + k: v for k, v in tiny.state_dict().items()}}, tmp_path / "tiny.ckpt")
    loaded = networks.load(tmp_path / "tiny.ckpt")
    assert type(loaded) is mirage.MIRAGE and same_weights(loaded, tiny) and not loaded.training


def test_a_file_of_mirage_of_any_size_is_mirages(tmp_path):
    network = mirage_network(12)
    mirage.save_checkpoint(network, tmp_path / "own.safetensors")
    loaded = networks.load(tmp_path / "own.safetensors", drop_path=0.0)
    assert type(loaded) is mirage.MIRAGE and loaded.config == {**network.config, "drop_path": 0.0}
    with pytest.warns(CheckpointWarning, match="by its shapes MIRAGE"):  # never taken for a Restormer
        assert type(networks.load(network.state_dict())) is mirage.MIRAGE
    assert type(networks.load(mirage.mirage_tiny().state_dict())) is mirage.MIRAGE


def test_mirages_own_loader_says_who_reads_a_restormer(tmp_path):
    torch.save(build("restormer", {**RESTORMER, "dim": 24}).state_dict(), tmp_path / "restormer.pth")
    with pytest.raises(CheckpointError, match="no MIRAGE, but a network like Restormer.*mirage.networks.load"):
        mirage.from_checkpoint(tmp_path / "restormer.pth")


def test_weights_of_none_of_them_name_the_closest():
    state = build("restormer", RESTORMER).state_dict()
    for name in ("reduce_chan_level2.weight", "latent.0.attn.temperature"):
        del state[name]
    state["output.weight"] = torch.zeros(3, 5, 3, 3)
    state["fre1.para1"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as raised:
        networks.load(state)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("state dict: the weights of none of the networks that are known (MIRAGE, NAFNet, Promp")
    assert lines[0].endswith("The closest is Restormer, of which there are")
    assert lines[1:] == [
        "  2 missing: latent.0.attn.temperature, reduce_chan_level2.weight",
        "  1 unexpected: fre1.para1",
        "  1 mis-shaped: output.weight (expected [3, 16, 3, 3], got [3, 5, 3, 3])",
    ]


@pytest.mark.parametrize(("name", "arguments"), [CASES[5], CASES[7], CASES[9]])
def test_a_missing_weight_is_named(name, arguments):
    state = build(name, arguments).state_dict()
    last = list(state)[-1]
    del state[last]
    with pytest.raises(CheckpointError) as raised:
        networks.load(state)
    kind = type(build(name, arguments)).__name__
    assert f"The closest is {kind}, of which there are\n  1 missing: {last}" in str(raised.value)


def test_weights_of_something_else(tmp_path):
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(CheckpointError, match="weights of none of the networks that are known"):
        networks.load(tmp_path / "linear.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        networks.load({})
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        networks.load(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="damaged"):
        networks.load(tmp_path / "text.pth")


def test_stored_arguments_that_build_nothing(tmp_path):
    state = build("nafnet", NAFNET).state_dict()
    for stored, message in (
        ({"name": "nafnet", "arguments": {"width": 0}}, "builds no network: width must be an integer of at least 1"),
        ({"name": "other", "arguments": {}}, "builds no network: name: expected one of"),
        (["nafnet"], "mirage_network: expected a name and arguments"),
    ):
        data = safetensors.torch.save(state, {NETWORK_KEY: json.dumps(stored)})
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            networks.load(tmp_path / "a.safetensors")
    data = safetensors.torch.save(state, {NETWORK_KEY: json.dumps({"name": "nafnet", "arguments": {"width": 8}})})
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not fit NAFNet"):
        networks.load(tmp_path / "a.safetensors")


def test_only_these_networks_are_saved(tmp_path):
    network = build("nafnet", NAFNET)
    with pytest.raises(ValueError, match="path must end in .safetensors"):
        networks.save(network, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="expected one of nafnet, .*got MIRAGE"):
        networks.save(mirage_network(), tmp_path / "a.safetensors")
    network.middle_blks.append(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="its weights are not those of nafnet"):
        networks.save(network, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
