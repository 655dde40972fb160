"""Networks of groups trained by the trainer and measured: what is trained on what, resumed, and scored."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from train_cases import SMALL, settings, write_pictures

import mirage
from mirage.grids import MeasureGroup, TrainAndMeasure, TrainGroup, search_groups
from mirage.grids.training import MOST_PSNR, named_kinds, psnr
from mirage.grids.workers import Stopped

KINDS = "data.sets=[{name: grids, clean: clean, kind: [GB, {kind: GN, sigma: 30}, SP]}]"
COMMON = [KINDS, "model.drop_path=0", "model.spd=false", "schedule.steps=2"]


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "clean")
    write_pictures(tmp_path / "test", count=3, seed=1)
    return tmp_path


def train_group(root, *overrides):
    arguments = {name: value for name, value in SMALL.items() if not name.startswith("spd")}
    return TrainGroup(settings(root, *COMMON, f"model.arguments={json.dumps(arguments)}", *overrides))


def measure_group(root, **options):
    return MeasureGroup(str(root / "test"), **{"crop": 16, "device": "cpu", **options})


def test_a_group_s_network_is_the_trainer_s(root):
    """The weights are those of a plain run with the group's degradations, and P is of the product's own restoring."""
    from mirage.train import Run, export_weights

    train, measure = train_group(root), measure_group(root, kinds=tuple(train_group(root).kinds.items()))
    assert train.degradations == ("GB", "GN", "SP") and train.steps == 2
    performance = TrainAndMeasure(root / "groups", train, measure)
    [found] = performance.measure([frozenset(["GN", "GB"])])
    assert set(found) == {"GB", "GN"}
    place = root / "groups" / "GB+GN"
    assert not list((place / "run").glob("*.ckpt")) and (place / "run" / "train.csv").exists()
    assert "loss" in (place / "run" / "log.txt").read_text() and performance.step_of("GN+GB") == 2

    config = train.config_of(["GB", "GN"], root / "plain")
    assert [one.kind for one in config.data.sets] == [["GB", {"kind": "GN", "sigma": 30}]]
    Run(config).train()
    export_weights(root / "plain", root / "plain.safetensors", dtype="float32")
    network = mirage.from_checkpoint(root / "plain.safetensors")
    state = mirage.from_checkpoint(place / "weights.safetensors").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    restore = mirage.Restorer(network, device="cpu")
    for name in found:
        each = [psnr(clean, restore(np.ascontiguousarray(seen))) for seen, clean in measure.pairs(name)]
        assert len(each) == 3 and found[name] == pytest.approx(np.mean(each), abs=1e-9)


def test_a_stopped_training_goes_on_and_ends_with_the_same_weights(root, monkeypatch):
    from mirage.train import Interrupted, Run

    group = [frozenset(["GB", "SP"])]
    whole = TrainAndMeasure(root / "whole", train_group(root, "schedule.steps=4"), measure_group(root))
    whole.measure(group)
    plain = Run._step

    def stopping(self, parts):
        if self.step == 3:
            self.save()
            raise Interrupted("stopped at step 3, which is saved")
        return plain(self, parts)

    train = train_group(root, "schedule.steps=4")
    monkeypatch.setattr(Run, "_step", stopping)
    with pytest.raises(Stopped, match="stopped at step 3"):
        TrainAndMeasure(root / "parts", train, measure_group(root)).measure(group)
    assert not (root / "parts" / "GB+SP" / "result.json").exists()
    steps = []
    monkeypatch.setattr(Run, "_step", lambda self, parts: steps.append(self.step) or plain(self, parts))
    parts = TrainAndMeasure(root / "parts", train, measure_group(root))
    assert parts.measure(group) == whole.measure(group)
    assert steps == [3]


def test_a_search_with_real_trainings(root):
    performance = TrainAndMeasure(root / "groups", train_group(root), measure_group(root))
    found = search_groups(("GB", "GN"), performance, delta=100.0, ranking=ranking(("GB", "GN")))
    assert found.groups == (("GB", "GN"),) and found.trainings == {"single": 2, "prepare": 1, "verify": 0}
    single = {name: performance.measure([frozenset([name])])[0][name] for name in ("GB", "GN")}
    shared = performance.measure([frozenset(["GB", "GN"])])[0]
    assert found.drops["GB+GN"] == pytest.approx(max(single[name] - shared[name] for name in shared))


def ranking(names):
    from mirage.grids import rank_groups

    return rank_groups(names, np.ones((len(names), len(names))))


# --- measuring


def test_pairs_are_fixed_and_of_the_degradation_alone(root):
    from mirage.degradations import create, generator_of

    measure = measure_group(root)
    first, again = ([(seen.copy(), clean) for seen, clean in measure.pairs("GN")] for _ in range(2))
    for (seen, clean), (other, same) in zip(first, again, strict=True):
        assert seen.shape == clean.shape == (16, 16, 3) and seen.dtype == clean.dtype == np.float32
        np.testing.assert_array_equal(seen, other)
        np.testing.assert_array_equal(clean, same)
        assert not np.array_equal(seen, clean)
    short = list(measure_group(root, limit=2).pairs("GN"))
    np.testing.assert_array_equal(short[1][0], first[1][0])
    assert not np.array_equal(next(iter(measure_group(root, seed=1).pairs("GN")))[0], first[0][0])
    clean = first[1][1]
    degraded, _ = create("GN")(clean.transpose(2, 0, 1)[None], generator_of(0, "GN/01"))
    np.testing.assert_array_equal(first[1][0], degraded[0].transpose(1, 2, 0))
    from PIL import Image

    whole = np.asarray(Image.open(root / "test" / "01.png"))
    np.testing.assert_array_equal(np.rint(clean * 255), whole[4:20, 8:24])
    assert next(iter(measure_group(root, crop=None).pairs("GN")))[1].shape == (24, 32, 3)


def test_psnr_is_the_evaluation_s(root):
    from mirage.evaluate import measure

    rng = np.random.default_rng(0)
    target = rng.random((9, 7, 3), dtype=np.float32)
    restored = target + 0.1 * rng.standard_normal(target.shape, dtype=np.float32)
    assert psnr(target, restored) == pytest.approx(measure(target, restored, ["psnr"])["psnr"], abs=1e-5)
    assert psnr(target, target) == MOST_PSNR
    one = np.zeros((10, 10, 3), np.float32)
    off = one.copy()
    off[0, 0, 0] = 0.5  # in the corner: no border is left out
    assert psnr(one, off) == pytest.approx(10 * np.log10(300 / 0.25))
    assert psnr(one, off - 0.5) == MOST_PSNR  # clipped to 0


def test_what_decides_results_is_what_identities_have(root):
    def same(*overrides):
        return train_group(root, *overrides).identity == train_group(root).identity

    assert same("trainer.threads=2", "data.workers=1", "output.folder=x", "trainer.accelerator=auto")
    assert not same("optimizer.lr=1e-4") and not same("schedule.steps=3") and not same("seed=1")
    assert not same("data.sets.0.kind=[GB, GN]")
    json.dumps(train_group(root).identity)

    def measured_alike(**options):
        return measure_group(root, **options).identity == measure_group(root).identity

    assert measured_alike(device="auto") and measured_alike(limit=3) and measured_alike(kinds=(("GB", "GB"),))
    assert not (measured_alike(seed=1) or measured_alike(crop=8) or measured_alike(limit=2))
    assert not measured_alike(kinds=(("GB", {"kind": "GB", "sigma": 3}),))
    before = measure_group(root).identity
    write_pictures(root / "test", count=3, seed=2, size=(32, 32))
    assert measure_group(root).identity != before


# --- errors


@pytest.mark.parametrize("kind, names", [
    (None, []), ("GB", ["GB"]), ("gaussian_blur", ["GB"]), ({"kind": "gn", "sigma": 3}, ["GN"]),
    (["JP", "low_haze"], ["JP", "low_haze"]), ("all", "GB MB RL SR RI DB JP PO IN GN SP".split()),
])  # fmt: skip
def test_names_of_kinds(kind, names):
    assert list(named_kinds(kind)) == names


@pytest.mark.parametrize("call, error, sentence", [
    (lambda r: train_group(r, "data.sets=[{clean: clean, sigma: 15}]"), ValueError, "expected a set with a kind"),
    (lambda r: train_group(r).config_of(["XX"], r), ValueError, "group: expected some of GB, GN, SP, got 'XX'"),
    (lambda r: named_kinds(["GB", "gaussian_blur"]), ValueError, "expected degradations of different names"),
    (lambda r: named_kinds(["GB+GN"]), ValueError, r"different names without \+"),
    (lambda r: named_kinds(["XX"]), ValueError, "XX"),
    (lambda r: MeasureGroup(str(r / "none")), FileNotFoundError, "no folder '.*none'"),
    (lambda r: measure_group(r, crop=0), ValueError, "crop: expected at least 1, got 0"),
    (lambda r: measure_group(r, limit=0), ValueError, "limit: expected at least 1, got 0"),
    (lambda r: list(measure_group(r, crop=64).pairs("GB")), ValueError, "00: expected at least 64 pixels a side, got"),
    (lambda r: list(measure_group(r).pairs("XX")), ValueError, "XX"),
    (lambda r: psnr(np.zeros((2, 2, 3)), np.zeros((2, 3, 3))), ValueError, "restored: expected the shape of the targ"),
    (lambda r: psnr(np.zeros((2, 2, 3)), np.full((2, 2, 3), np.nan)), ValueError, "values that are not finite"),
])  # fmt: skip
def test_what_is_wrong_is_told(root, call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(root)


def test_other_processes_get_the_same(root):
    train, measure = train_group(root), measure_group(root)
    assert pickle.loads(pickle.dumps((train, measure))) == (train, measure)


def test_the_configuration_itself_is_not_changed(root):
    train = train_group(root)
    before = dataclasses.asdict(train.config)
    train.config_of(["SP"], root / "x")
    assert dataclasses.asdict(train.config) == before
