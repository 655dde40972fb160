"""The trainer with other networks than MIRAGE: what it builds, a run, its checkpoints and exported weights."""

import pytest
import torch
from train_cases import settings, write_pictures

import mirage
from mirage import networks
from mirage.train import ConfigError, Run, export_weights, read_state
from mirage.train.build import build_loss, build_network
from mirage.train.export import model_card
from mirage.train.state import checkpoints

yaml = pytest.importorskip("yaml", reason="the extra [train] is not installed")
pytest.importorskip("lightning_fabric", reason="the extra [train] is not installed")

RESTORMER = "{dim: 4, num_blocks: [1, 1, 1, 1], num_refinement_blocks: 1, heads: [1, 1, 1, 1]}"
NAFNET = "{width: 4, encoder_blocks: [1, 1], middle_blocks: 1, decoder_blocks: [1, 1]}"
SRRESNET = "{dim: 6, num_blocks: 1, upscale: 2, global_residual: false}"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "clean")
    return tmp_path


def config_of(root, network, arguments, *more):
    """A configuration that has no arguments of MIRAGE."""
    chosen = settings(root, f"model.network={network}", *more)
    chosen.model.arguments = yaml.safe_load(arguments)
    return chosen


@pytest.mark.parametrize(
    ("network", "arguments"),
    [("restormer", RESTORMER), ("nafnet", NAFNET), ("srresnet", "{dim: 6, num_blocks: 1, upscale: 1}")],
)
def test_a_run_trains_resumes_and_is_exported(root, network, arguments):
    more = ("schedule.steps=4", "schedule.kind=wsd", "trainer.ema=0.9", "loss.fourier_weight=0")
    whole = Run(config_of(root, network, arguments, *more, f"output.folder={root / 'whole'}"))
    before = {name: value.clone() for name, value in whole.network.state_dict().items()}
    whole.train()
    part = Run(config_of(root, network, arguments, *more, "schedule.steps=2"))
    part.train()
    resumed = Run(config_of(root, network, arguments, *more))
    assert resumed.step == 2
    resumed.train()
    after = whole.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in resumed.network.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())

    (checkpoint,) = checkpoints(root / "whole")[-1:]
    loaded = networks.load(checkpoint, key="state_dict.net")
    assert type(loaded) is networks.registry.NETWORKS[network] and loaded.config == whole.network.config
    assert all(torch.equal(value, after[name]) for name, value in loaded.state_dict().items())
    export_weights(checkpoint, root / "w.safetensors", dtype="float32")
    exported = networks.load(root / "w.safetensors")
    average = whole.average.module.state_dict()
    assert exported.config == whole.network.config
    assert all(torch.equal(value, average[name]) for name, value in exported.state_dict().items())
    card = model_card(read_state(checkpoint), "w.safetensors", data="some", licence="some")
    assert f"\n{type(loaded).__name__} (`" in card and "SPD head" not in card and "MIRAGE" not in card


def test_super_resolution_gets_pictures_reduced_bicubically(root, monkeypatch):
    chosen = config_of(root, "srresnet", SRRESNET, "schedule.steps=1", "data.sets.0.sigma=null",
                       "data.sets.0.scale=2", "data.augment=none")  # fmt: skip
    run = Run(chosen)
    seen = []
    run.network.register_forward_hook(lambda m, inputs, out: seen.append((inputs[0].clone(), out.clone())))
    targets = []
    original = run.loss.forward
    monkeypatch.setattr(run.loss, "forward", lambda a, b: (targets.append(b), original(a, b))[1])
    run.train()
    (x, y), (clean,) = seen[0], targets
    assert x.shape == (2, 3, 8, 8) and y.shape == clean.shape == (2, 3, 16, 16)
    expected = torch.nn.functional.interpolate(clean, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    export_weights(checkpoints(root / "run")[-1], root / "w.safetensors")
    assert networks.load(root / "w.safetensors").config == run.network.config
    assert networks.load(checkpoints(root / "run")[-1]).config["global_residual"] is False
    with pytest.raises(ConfigError, match=r"data.crop: expected a multiple of the network's scale 3, got 16"):
        build_network(config_of(root, "srresnet", "{dim: 4, num_blocks: 1, upscale: 3}"))


def test_what_nothing_uses_does_not_train(root):
    network = build_network(config_of(root, "promptir", RESTORMER))
    frozen = {name.split(".")[0] for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}{i}" for name in ("chnl_reduce", "reduce_noise_channel_") for i in (1, 2, 3)}
    assert build_loss(config_of(root, "promptir", RESTORMER)).contrastive_weight == 0


def test_weights_to_start_from(root):
    torch.manual_seed(1)
    published = networks.create("nafnet", width=4, enc_blk_nums=[1, 1], middle_blk_num=1, dec_blk_nums=[1, 1])
    torch.save({"params": published.state_dict()}, root / "w.pth")
    network = build_network(config_of(root, "nafnet", NAFNET, f"model.weights={root / 'w.pth'}"))
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in network.state_dict().items())
    torch.save(mirage.mirage_tiny().state_dict(), root / "m.pth")
    with pytest.raises(mirage.CheckpointError):
        build_network(config_of(root, "nafnet", NAFNET, f"model.weights={root / 'm.pth'}"))


def test_configurations_that_do_not_go_together(root):
    with pytest.raises(
        ConfigError, match="model.network: expected one of mirage, nafnet, .*the nearest is 'restormer'"
    ):
        settings(root, "model.network=restorer")
    with pytest.raises(ConfigError, match="model.ablation: is of MIRAGE alone, got model.network=nafnet"):
        settings(root, "model.network=nafnet", "model.ablation=euclidean")
    with pytest.raises(ConfigError, match="model.arguments: nafnet has no argument '"):
        build_network(settings(root, "model.network=nafnet"))
