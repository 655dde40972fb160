"""Super-resolution: the network sees pictures made smaller, and gives them as large as they were."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from train_cases import settings, write_pictures

from mirage.degradations import create
from mirage.train import Run, load_config
from mirage.train.config import ConfigError, PictureSet, packaged
from mirage.train.data import TrainingSet, ValidationSet, find_pairs
from mirage.train.data.samples import reduce

pytest.importorskip("lightning_fabric", reason="the extra [train] is not installed")

NETWORK = ["model.network=srresnet", "model.fast=false", "loss.fourier_weight=0"]
NETWORK += ["model.arguments={dim: 4, num_blocks: 1, upscale: 4}"]
SET = "data.sets=[{name: sr, clean: clean, scale: 4}]"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "clean")
    (tmp_path / "config.yaml").write_text(
        """
optimizer: {lr: 2e-3, clip: 1.0}
schedule: {steps: 2}
data: {crop: 16, validation_crop: 16, batch: 2}
trainer: {accelerator: cpu, threads: 1}
output: {checkpoint_minutes: null, log_steps: 1}
"""
    )
    return tmp_path


def cubic(x):
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def weights(size, scale):
    """The matrix that makes a side smaller: each pixel is a sum over 4 * scale ones around its place, of weight 1."""
    places = (np.arange(size // scale) + 0.5) * scale - 0.5
    matrix = cubic((np.arange(size) - places[:, None]) / scale)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pictures_are_made_smaller_with_a_cubic_as_wide_as_the_scale(scale):
    image = np.random.default_rng(0).random((12 * scale, 7 * scale, 3)).astype(np.float32)
    expected = np.einsum("yh,xw,hwc->yxc", weights(12 * scale, scale), weights(7 * scale, scale), image)
    found = reduce(image, scale)
    assert found.shape == (12, 7, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.clip(0, 1), atol=2e-6)


def test_what_passes_0_and_1_is_clipped():
    image = np.zeros((32, 32, 3), np.float32)
    image[:, 16:] = 1
    found = reduce(image, 4)
    assert found.min() == 0 and found.max() == 1
    raw = np.einsum("yh,xw,hwc->yxc", weights(32, 4), weights(32, 4), image)
    assert raw.min() < -0.01 and raw.max() > 1.01


def test_samples_are_crops_and_the_same_made_smaller(root):
    data = settings(root, SET).data
    samples = TrainingSet(data, seed=0)
    for number in range(6):
        sample = samples[number]
        assert sample.clean.shape == (3, 16, 16) and sample.degraded.shape == (3, 4, 4)
        again = torch.from_numpy(reduce(sample.clean.numpy().transpose(1, 2, 0), 4).transpose(2, 0, 1))
        assert torch.equal(sample.degraded, again)
    (name, sample), *_ = ValidationSet(replace(data, hold_out=1), find_pairs(data.sets[0], root)[:1], seed=0)
    assert name == "sr"
    assert sample.clean.shape == (3, 16, 16) and sample.degraded.shape == (3, 4, 4)


def test_noise_is_added_to_the_smaller_picture_and_rain_to_the_large_one(root):
    one = TrainingSet(settings(root, "data.sets=[{clean: clean, scale: 4, sigma: 25}]").data, seed=0)
    noise = torch.stack([one[n].degraded - TrainingSet(settings(root, SET).data, 0)[n].degraded for n in range(40)])
    assert noise.shape == (40, 3, 4, 4)
    assert noise.std().item() == pytest.approx(25 / 255, rel=0.1)
    rainy = TrainingSet(settings(root, "data.sets=[{clean: clean, scale: 4, rain: true}]").data, seed=0)[0].degraded
    assert rainy.shape == (3, 4, 4)
    assert torch.equal(rainy, (rainy * 255).round() / 255)
    kinds = TrainingSet(settings(root, "data.sets=[{clean: clean, scale: 4, kind: RL}]").data, seed=0)[0]
    blurred, _ = create("RL")(kinds.clean[None], 0)
    again = torch.from_numpy(reduce(blurred[0].numpy().transpose(1, 2, 0), 4).transpose(2, 0, 1))
    assert torch.equal(kinds.degraded, again)


def test_two_steps_train_and_psnr_of_held_out_pictures_is_that_of_their_enlargement(root):
    run = Run(settings(root, SET, *NETWORK, "data.hold_out=2", "trainer.ema=0.9"))
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.train()
    assert run.step == 2
    assert all(not torch.equal(before[name], value) for name, value in run.network.state_dict().items())
    with open(root / "run" / "validation.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    for suffix, network in (("", run.network), ("_ema", run.average.module)):
        found = []
        for pair in run.data.held_out:
            clean = run.data.read(pair.clean)[4:20, 8:24].astype(np.float32) / np.float32(255)  # of 24 x 32 pixels
            small = torch.from_numpy(reduce(clean, 4).transpose(2, 0, 1))[None]
            with torch.no_grad():
                large = network.eval()(small)[0].numpy().transpose(1, 2, 0).clip(0, 1)
            found.append(-10 * np.log10(np.square(large.astype(np.float64) - clean).mean()))
        assert float(last[f"sr{suffix}"]) == pytest.approx(np.mean(found), abs=1e-4)
    assert 5 < float(last["sr"]) < 60


def test_a_run_goes_on_where_it_stopped(root):
    whole = Run(settings(root, SET, *NETWORK, "schedule.kind=wsd", out="whole"))
    whole.train()
    first = Run(settings(root, SET, *NETWORK, "schedule.kind=wsd", "schedule.steps=1", out="parts"))
    first.train()
    second = Run(settings(root, SET, *NETWORK, "schedule.kind=wsd", out="parts"))
    assert second.step == 1
    second.train()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])


def test_the_packaged_descriptor_is_the_published_network_for_x4(root):
    config = load_config("descriptor-srresnet", [f"data.root={root}", "data.sets.0.clean=clean", "data.hold_out=1"])
    config.output.folder = str(root / "run")
    run = Run(config)
    assert sum(p.numel() for p in run.network.parameters() if p.requires_grad) == 1_517_571
    assert run.loss.fourier_weight == run.loss.contrastive_weight == 0
    assert run.data[0].degraded.shape == (3, 32, 32)
    assert run.network.scale == 4
    assert "descriptor-srresnet" in packaged()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SET], r"data.sets\[0\].scale: expected 1, as the network enlarges .*, got 4"),
        (["data.sets=[{clean: clean, sigma: 25}]", *NETWORK], r"scale: expected 4, as the network enlarges .*SRResNet"),
    ],
)
def test_a_network_of_another_scale_is_refused(root, overrides, message):
    small = [] if NETWORK[0] in overrides else ["model.arguments={dim: 6, num_blocks: [1, 1, 1, 1]}"]
    with pytest.raises(ConfigError, match=message):
        Run(settings(root, *overrides, *small))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sets=[{clean: clean, scale: 0}]", r"data.sets\[0\].scale: expected at least 1, got 0"),
        ("data.sets=[{clean: clean, scale: 4, degraded: small}]", "expected degraded .* or scale=4, .* got both"),
        ("data.sets=[{clean: clean, scale: 3}]", "data.crop: expected a multiple of the sets' scale 3, got 16"),
        ("data.sets=[{clean: clean, scale: 4}, {clean: clean, sigma: 5}]", "expected one scale of all sets, got 1, 4"),
        ("data.sets=[{clean: clean}]", "sigma .noise. or rain=true, a kind or a scale"),
    ],
)
def test_what_does_not_go_together_is_refused(root, override, message):
    with pytest.raises(ConfigError, match=message):
        settings(root, override)


def test_a_set_with_a_scale_alone_is_one_of_clean_pictures(root):
    pairs = find_pairs(PictureSet(clean="clean", scale=4), root)
    assert len(pairs) == 4
    assert all(pair.scale == 4 and pair.degraded is None and pair.sigma is None for pair in pairs)
