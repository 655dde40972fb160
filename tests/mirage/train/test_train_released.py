"""Checkpoints to and from Lightning's Trainer with a module laid out as the released code's, and with that code itself.

    MIRAGE_RELEASED_CODE=path/to/MIRAGE pytest tests/mirage/train/test_train_released.py

The released code needs einops; for what else it imports and training does not use (timm, fvcore, torchvision, wandb)
there are substitutes where they are not installed.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import lookalike
import pytest
import torch
from torch import nn
from train_cases import SMALL, settings, write_pictures

import mirage
from mirage.losses import MirageLoss
from mirage.train import Run
from mirage.train.data import Sample
from mirage.train.state import checkpoints, read_state

lightning = pytest.importorskip("lightning.pytorch", reason="needs the package lightning")
FOLDER = os.environ.get("MIRAGE_RELEASED_CODE")
RELEASED = "{dim: 24, num_blocks: [3, 5, 5, 7], num_refinement_blocks: 2, spd_shallow_channels: 12, "
RELEASED += "spd_latent_channels: 24, spd_features: 64}"
RATES = ["schedule.epochs=130", "schedule.steps=null", "schedule.by_epoch=true", "schedule.warmup_epochs=15"]
RATES += ["schedule.horizon_epochs=150", "optimizer.lr=2e-4", "optimizer.clip=null", "loss.preset=released"]


class Layout(lightning.LightningModule):
    """The released code's module as far as checkpoints show it: a network called net, AdamW over all weights."""

    def __init__(self, opt=None):
        super().__init__()
        self.net = mirage.mirage_tiny(**SMALL, drop_path=0.0)
        self.loss_fn = nn.L1Loss()

    def training_step(self, batch, batch_idx):
        (_, degraded, clean) = batch
        return MirageLoss("released")(self.net(degraded, return_spd=True), clean)[0]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-4)


@pytest.fixture(scope="module")
def released():
    """The released code's module class."""
    if FOLDER is None:
        pytest.skip("MIRAGE_RELEASED_CODE names no checkout of the released code")
    pytest.importorskip("einops", reason="the released code needs einops")
    transforms = dict.fromkeys(("ToPILImage", "Compose", "RandomCrop", "ToTensor", "Grayscale"), lambda *_: None)
    substitutes = {
        "fvcore.nn": {"FlopCountAnalysis": None, "flop_count_table": None},
        "timm.models.layers": {"DropPath": lookalike.DropPath, "trunc_normal_": nn.init.trunc_normal_},
        "torchvision.transforms": transforms,
        "wandb": {},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in substitutes.items():
            try:
                importlib.import_module(name)
                continue
            except Exception:  # whatever a package raises that does not fit the others
                pass
            parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
            for module in (*parents, name):
                patch.setitem(sys.modules, module, ModuleType(module))
            vars(sys.modules[name]).update(content)
        patch.setattr(sys, "argv", ["train_tiny.py"])
        patch.syspath_prepend(FOLDER)
        for module in ("options", "utils", "net", "train_tiny"):
            patch.delitem(sys.modules, module, raising=False)
        yield importlib.import_module("train_tiny").MIRAGEModel
        for module in [m for m in sys.modules if m.split(".")[0] in ("options", "utils", "net", "train_tiny")]:
            if str(getattr(sys.modules[module], "__file__", None) or FOLDER).startswith(str(Path(FOLDER))):
                del sys.modules[module]


@pytest.fixture(params=["layout", "released"])
def case(request, tmp_path):
    """The module's class, and a function that begins our run of the same network."""
    write_pictures(tmp_path / "clean", 2)
    real = request.param == "released"
    cls = request.getfixturevalue("released") if real else Layout
    arguments = [f"model.arguments={RELEASED}"] if real else []

    def begin(*overrides, out="run"):
        return Run(settings(tmp_path, "model.drop_path=0", *arguments, *RATES, *overrides, out=out))

    def make():
        torch.manual_seed(0)
        module = cls(SimpleNamespace(fft_loss_weight=0.1))
        for inner in module.modules():  # their random numbers are not ours
            if isinstance(getattr(inner, "drop_path", None), nn.Module):
                inner.drop_path = nn.Identity()
        return module

    return SimpleNamespace(make=make, begin=begin, cls=cls, folder=tmp_path, real=real)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(2, 3, 16, 16, generator=generator)
    return (["a", "b"], 0), clean + 0.1 * torch.randn(2, 3, 16, 16, generator=generator), clean


class Rates(lightning.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(module, epochs, seed=0, ckpt_path=None):
    """The Trainer over ``epochs`` epochs of one batch each; the rates of its steps."""
    rates = Rates()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[rates],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader([batch(seed)], batch_size=None), ckpt_path=ckpt_path)
    return trainer, rates.rates


def own(run):
    return dict(run.network.named_parameters())


def close(found, expected, before):
    """Weights, by how far the steps moved them (a gradient of rounding alone still moves Adam by its rate)."""
    moved = math.sqrt(sum((expected[name] - before[name]).detach().square().sum().item() for name in before))
    apart = math.sqrt(sum((expected[name] - found[name]).detach().square().sum().item() for name in before))
    assert 0 < moved and apart < 0.05 * moved


def test_training_goes_on_from_a_checkpoint_of_the_trainer(case):
    module = case.make()
    trainer, rates = fit(module, 3)
    path = case.folder / "trainer.ckpt"
    trainer.save_checkpoint(path)
    run = case.begin(f"trainer.resume={path}")
    assert run.step == 3 and run.resumed == path
    assert all(torch.equal(value, module.net.state_dict()[name]) for name, value in run.network.state_dict().items())
    theirs = trainer.optimizers[0].state_dict()["state"]
    for state, (name, _) in zip(theirs.values(), module.net.named_parameters(), strict=True):
        ours = run.optimizer.state[own(run)[name]]
        assert torch.equal(ours["exp_avg"], state["exp_avg"]) and float(ours["step"]) == 3, name
    if case.real:  # one batch an epoch: our schedule is theirs
        assert rates == pytest.approx([run.rates.at(round(step * run.rates.steps_per_epoch)) for step in range(3)])
        assert rates[:2] == [0, 0] and rates[2] == pytest.approx(2e-4 / 14)
    _, degraded, clean = batch(1)
    before = {name: value.clone() for name, value in own(run).items()}
    rate = 1e-3
    run.rates = SimpleNamespace(at=lambda step: rate)
    run.model.train()
    run._step([Sample(degraded, clean, ["a", "b"])])
    optimizer = trainer.optimizers[0]
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    module.train()
    module.log = lambda *_, **__: None
    module.training_step(batch(1), 0).backward()
    optimizer.step()
    close(own(run), dict(module.net.named_parameters()), before)


def test_the_trainer_goes_on_from_a_checkpoint_of_ours(case):
    run = case.begin("schedule.epochs=2", "schedule.by_epoch=false", "schedule.warmup_epochs=null")
    run.train()
    (path,) = checkpoints(case.folder / "run")
    module = case.cls.load_from_checkpoint(path, opt=SimpleNamespace(fft_loss_weight=0.1))  # strict
    assert all(torch.equal(v, module.net.state_dict()[name]) for name, v in run.network.state_dict().items())
    module = case.make()
    trainer, rates = fit(module, 1, seed=1, ckpt_path=path)
    assert len(rates) == 1 and rates[0] == pytest.approx(run.optimizer.param_groups[0]["lr"])
    states = trainer.optimizers[0].state_dict()["state"].values()
    assert {float(state["step"]) for state in states} == {run.step + 1}
    before = {name: value.clone() for name, value in own(run).items()}
    run.rates = SimpleNamespace(at=lambda step: rates[0])
    _, degraded, clean = batch(1)
    run.model.train()
    run._step([Sample(degraded, clean, ["a", "b"])])
    close(dict(module.net.named_parameters()), own(run), before)


def test_weights_of_the_trainer_start_a_training(case):
    module = case.make()
    trainer, _ = fit(module, 1)
    trainer.save_checkpoint(case.folder / "weights.ckpt", weights_only=True)
    run = case.begin(f"model.weights={case.folder / 'weights.ckpt'}")
    assert run.step == 0
    assert all(torch.equal(v, module.net.state_dict()[name]) for name, v in run.network.state_dict().items())
    with pytest.raises(mirage.CheckpointError, match="it has no optimizer_states. To start from its weights alone"):
        read_state(case.folder / "weights.ckpt")


def test_its_optimizer_state_fits_where_the_head_does_not_train(case):
    module = case.make()
    trainer, _ = fit(module, 1)
    trainer.save_checkpoint(case.folder / "whole.ckpt")
    run = case.begin(f"trainer.resume={case.folder / 'whole.ckpt'}", "loss.contrastive_weight=0")
    theirs = dict(
        zip(dict(module.net.named_parameters()), trainer.optimizers[0].state_dict()["state"].values(), strict=True)
    )
    trained = {name: p for name, p in own(run).items() if p.requires_grad}
    assert len(trained) == len(theirs) - 8
    assert all(torch.equal(run.optimizer.state[p]["exp_avg"], theirs[name]["exp_avg"]) for name, p in trained.items())


def test_the_released_codes_noise_and_lists(released, tmp_path):
    """Its degradation of a patch is our `noise: truncated`, and its file lists are read."""
    import numpy as np

    from mirage.train.config import PictureSet
    from mirage.train.data import find_pairs
    from mirage.train.data.samples import _degrade

    patch = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    degradation = importlib.import_module("utils.degradation_utils").Degradation(SimpleNamespace(patch_size=16))
    draws = np.random.default_rng(1).standard_normal(patch.shape, dtype=np.float32)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(np.random, "randn", lambda *_: draws)
        theirs, _ = degradation._add_gaussian_noise(patch, 25)
    write_pictures(tmp_path / "n", 1)
    (pair,) = find_pairs(PictureSet(clean=str(tmp_path / "n"), sigma=25, noise="truncated"))
    fake = SimpleNamespace(uniform=lambda low, high: low, standard_normal=lambda shape, dtype: draws)
    ours = _degrade(patch.astype(np.float32) / np.float32(255), pair, fake) * 255
    assert (
        np.abs(ours - theirs).max() <= 1 and (np.abs(ours - theirs) > 0.01).mean() < 0.01
    )  # rounding at whole numbers
    names = (Path(FOLDER) / "data_dir" / "rainy" / "rainTrain.txt").read_text().splitlines()
    from PIL import Image

    for name in names:
        for file in (name, name.replace("rainy/rain", "gt/norain")):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / file)
    listed = str(Path(FOLDER).resolve() / "data_dir" / "rainy" / "rainTrain.txt")
    one = PictureSet(degraded="rainy", clean="gt", pair="derain", names=listed)
    assert len(find_pairs(one, tmp_path)) == len(names) == 200
