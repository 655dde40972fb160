"""Training on degradations drawn for each sample: ``kind`` of a set."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import torch

for _module in ("lightning_fabric", "yaml", "PIL", "fsspec", "braceexpand"):
    pytest.importorskip(_module, reason="the extra [train] is not installed")

from train_cases import settings, write_pictures  # noqa: E402

from mirage.degradations import create  # noqa: E402
from mirage.train import ConfigError, Run  # noqa: E402
from mirage.train.config import Data, PictureSet  # noqa: E402
from mirage.train.data import TrainingSet, ValidationSet, batches  # noqa: E402
from mirage.train.export import _what  # noqa: E402


def kinds(folder, kind, **more):
    return Data(sets=[PictureSet(name="d", clean=str(folder), kind=kind)], crop=16, batch=4, **more)


def test_a_sample_is_degraded_by_a_kind_with_its_settings(tmp_path):
    data = TrainingSet(kinds(write_pictures(tmp_path / "clean"), {"kind": "SR", "scale": 0.5, "methods": "nearest"}), 0)
    for number in range(6):
        degraded, clean, _ = data[number]
        expected, _ = create("SR", scale=0.5, methods="nearest")(clean[None], 0)
        assert (
            degraded.dtype == torch.float32 and torch.equal(degraded, expected[0]) and not torch.equal(degraded, clean)
        )


def test_a_list_mixes_its_kinds_each_as_often(tmp_path):
    """What lines paint over is of one colour, white or black; noise is not."""
    folder = write_pictures(tmp_path / "clean", size=(16, 16))
    data = TrainingSet(kinds(folder, ["IN", "gaussian_noise"]), seed=0)
    painted = 0
    for number in range(200):
        degraded, clean, _ = data[number]
        changed = degraded[(degraded != clean)]
        painted += set(changed.unique().tolist()) in ({0.0}, {1.0}, set())
    assert abs(painted - 100) < 5 * np.sqrt(50)
    assert torch.equal(data[7].degraded, TrainingSet(kinds(folder, ["IN", "GN"]), seed=0)[7].degraded)
    assert not torch.equal(data[7].degraded, TrainingSet(kinds(folder, ["IN", "GN"]), seed=1)[7].degraded)


def test_workers_see_the_same_samples(tmp_path):
    folder = write_pictures(tmp_path / "clean")
    alone = TrainingSet(kinds(folder, "all"), seed=0)
    shared = TrainingSet(kinds(folder, "all", workers=2), seed=0)
    for one, other in zip(batches(alone, 8, 2), batches(shared, 8, 2), strict=True):
        assert torch.equal(one.degraded, other.degraded) and one.name == other.name


def test_shards_of_clean_pictures_have_kinds_too(tmp_path):
    folder = write_pictures(tmp_path / "clean")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for path in sorted(folder.iterdir()):
            shard.add(path, path.name)
    data = Data(sets=[PictureSet(shards=str(tmp_path / "a.tar"), kind="RL")], crop=16)
    degraded, clean, name = TrainingSet(data, seed=0)[0]
    assert torch.equal(degraded, create("RL")(clean[None], 0)[0][0]) and "a.tar:" in name


def test_each_kind_of_a_mixture_is_validated_by_itself_the_same_every_time(tmp_path):
    data = kinds(write_pictures(tmp_path / "clean"), ["GB", "GN", "low+haze"], hold_out=1, validation_crop=16)
    training = TrainingSet(data, seed=0)
    validation = ValidationSet(data, training.held_out, seed=0)
    first = list(validation)
    assert [name for name, _ in first] == ["d_gaussian_blur", "d_gaussian_noise", "d_low_haze"]
    assert all(torch.equal(a.degraded, b.degraded) for (_, a), (_, b) in zip(first, validation, strict=True))
    single = kinds(tmp_path / "clean", "GB", hold_out=1, validation_crop=16)
    assert [name for name, _ in ValidationSet(single, TrainingSet(single, 0).held_out, 0)] == ["d"]


def test_interrupt_and_resume_gives_the_same_weights_bit_for_bit(tmp_path):
    write_pictures(tmp_path / "clean")
    change = ("data.sets.0.kind=all", "data.sets.0.sigma=null", "schedule.kind=wsd")

    def trained(*more, out):
        run = Run(settings(tmp_path, *change, *more, out=out))
        run.train()
        return run

    whole = trained(out="whole")
    first = trained("schedule.steps=2", out="parts")
    resumed = trained(out="parts")
    assert first.step == 2 and resumed.resumed is not None and resumed.step == whole.step == 6
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "data.sets.0.kind=gausian_blur",
            r"data.sets\[0\].kind: unknown degradation .*; the nearest is 'gaussian_blur'",
        ),
        ("data.sets.0.kind={kind: GB, sigma: [4, 1]}", r"data.sets\[0\].sigma: expected a range"),
        ("data.sets.0.kind=[]", r"data.sets\[0\].kind: expected a name, a mapping with kind, or a list"),
        ("data.sets.0.rain=true", r"data.sets\[0\].kind: goes with clean pictures alone, got rain beside it"),
        ("data.sets.0.sigma=25", r"data.sets\[0\].kind: goes with clean pictures alone, got sigma beside it"),
        ("data.sets.0.degraded=there", r"data.sets\[0\].kind: goes with clean pictures alone, got degraded beside it"),
        ("data.sets.0.noise=truncated", r"data.sets\[0\].kind: goes with clean pictures alone, got noise beside it"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, "data.sets.0.sigma=null", "data.sets.0.kind=GB", change)


def test_cards_tell_the_kinds():
    assert _what({"kind": "all"}) == "the eleven degradations of GRIDS, drawn for each sample"
    described = _what(json.loads('{"kind": ["GB", {"kind": "GN", "sigma": [5, 9]}]}'))
    assert described == "GB, GN (sigma [5, 9]), drawn for each sample"
