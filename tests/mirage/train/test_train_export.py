"""Exports: weights alone, which restore; and the card that tells of them."""

from __future__ import annotations

import pytest
import safetensors
import torch
from click.testing import CliRunner
from train_cases import settings, write_pictures

import mirage
from mirage.cli import main
from mirage.train import Run, export_weights, read_state
from mirage.train.state import checkpoints

pytest.importorskip("lightning_fabric", reason="the extra [train] is not installed")


@pytest.fixture
def run(tmp_path):
    write_pictures(tmp_path / "clean")
    run = Run(settings(tmp_path, "trainer.ema=0.5", "optimizer.weight_decay=0"))
    run.train()
    return run


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_average_is_exported_and_read_back_by_the_package(run, tmp_path, dtype):
    output = tmp_path / "weights.safetensors"
    state = export_weights(tmp_path / "run", output, dtype=dtype)
    assert state.step == 6
    loaded, expected = mirage.from_checkpoint(output), run.average.module.eval()
    for name, value in expected.state_dict().items():
        found = loaded.state_dict()[name]
        limit = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
        assert (found - value).abs().max() <= limit * value.abs().max() + 1e-7 * (dtype == "float16"), name
    with safetensors.safe_open(output, "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_tensor(name).dtype for name in names if "num_batches" not in name}
    assert names == set(expected.state_dict()) and dtypes == {getattr(torch, dtype)}
    assert loaded.config == run.network.config


def test_the_command_writes_weights_and_card(run, tmp_path):
    results = tmp_path / "results.md"
    results.write_text("| set | PSNR |\n")
    output, card = tmp_path / "denoise.safetensors", tmp_path / "denoise.md"
    options = ["--card", card, "--data", "BSD400", "--licence", "research only", "--results", results, "--now"]
    result = CliRunner().invoke(main, [str(a) for a in ["train", "export", tmp_path / "run", output, *options]])
    assert result.exit_code == 0, result.output
    loaded = mirage.from_checkpoint(output).state_dict()
    name = "output.weight"
    assert torch.equal(loaded[name], run.network.state_dict()[name].half().float())
    assert not torch.equal(loaded[name], run.average.module.state_dict()[name].half().float())
    text = card.read_text()
    for part in ("# denoise.safetensors", "| data | BSD400 |", "research only", "6 of 2 crops", "16 x 16", "adamw",
                 "Gaussian noise of sigma 15 to 50", "0.002", "cosine decay", "| set | PSNR |", "with SPD head",
                 "| average | none |"):  # fmt: skip
        assert part in text, part
    assert "intermediate state" not in text
    options.remove("--now")
    result = CliRunner().invoke(main, [str(a) for a in ["train", "export", tmp_path / "run", output, *options]])
    assert result.exit_code == 0, result.output
    assert "| average | of decay 0.5 |" in card.read_text()


@pytest.mark.parametrize(
    ("overrides", "intermediate", "said"),
    [
        (["schedule.kind=wsd"], True, "then constant (no decay yet)"),
        (["schedule.kind=wsd", "schedule.decay_from=2"], False, "constant to step 2, then linear decay to step 6"),
    ],
)
def test_the_card_says_whether_training_has_ended(tmp_path, overrides, intermediate, said):
    write_pictures(tmp_path / "clean")
    Run(settings(tmp_path, *overrides)).train()
    card = tmp_path / "card.md"
    arguments = ["train", "export", tmp_path / "run", tmp_path / "w.safetensors", "--card", card]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert ("intermediate state" in card.read_text()) == intermediate and said in card.read_text()
    assert "| data | clean |" in card.read_text() and "not stated" in card.read_text()


def test_the_card_says_what_training_started_from(run, tmp_path):
    export_weights(tmp_path / "run", tmp_path / "first.safetensors")
    weights = f"model.weights={tmp_path / 'first.safetensors'}"
    settings_of_second = ("output.folder=" + str(tmp_path / "second"), weights)
    Run(settings(tmp_path, *settings_of_second, "data.batch=1")).train()
    card = tmp_path / "card.md"
    arguments = ["train", "export", tmp_path / "second", tmp_path / "w.safetensors", "--card", card]
    assert CliRunner().invoke(main, [str(a) for a in arguments]).exit_code == 0
    assert "| starts from | the weights of `first.safetensors` |" in card.read_text()
    assert "| steps | 6 of 1 crop |" in card.read_text()
    assert "starts from" not in _card_of(tmp_path / "run", tmp_path)


def _card_of(run, tmp_path):
    card = tmp_path / "other.md"
    arguments = ["train", "export", run, tmp_path / "other.safetensors", "--card", card]
    assert CliRunner().invoke(main, [str(a) for a in arguments]).exit_code == 0
    return card.read_text()


def test_equal_weights_give_equal_files(run, tmp_path):
    names = [tmp_path / f"{i}.safetensors" for i in range(8)]  # safetensors orders two entries one way or the other
    for name in names:
        export_weights(tmp_path / "run", name)
    assert len({name.read_bytes() for name in names}) == 1
    with safetensors.safe_open(names[0], "pt") as file:
        assert sorted(file.metadata()) == ["format", "mirage_config"]
        assert file.keys()


def test_what_cannot_be_exported(run, tmp_path):
    (path,) = checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match="output must end in .safetensors"):
        export_weights(path, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="dtype: expected one of float32, float16, bfloat16, got 'int8'"):
        export_weights(path, tmp_path / "w.safetensors", dtype="int8")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        export_weights(tmp_path / "clean", tmp_path / "w.safetensors")
    with torch.no_grad():
        run.average.module.output.weight[0, 0, 0, 0] = 1e6
    run.save()
    with pytest.raises(
        ValueError, match=r"output.weight: holds values that are not finite as torch.float16: of at most"
    ):
        export_weights(path, tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()
    path.write_bytes(path.read_bytes()[:2000])
    result = CliRunner().invoke(main, ["train", "export", str(path), str(tmp_path / "w.safetensors")])
    assert result.exit_code == 1 and "damaged" in result.output


def test_an_ablated_network_is_exported_by_its_names(tmp_path):
    write_pictures(tmp_path / "clean")
    run = Run(settings(tmp_path, "model.ablation=no_mlp", "schedule.steps=1"))
    run.train()
    export_weights(tmp_path / "run", tmp_path / "w.safetensors", dtype="float32")
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata()["mirage_ablation"] == "no_mlp"
        assert set(file.keys()) == set(run.network.state_dict())


def test_a_checkpoint_of_training_is_itself_a_checkpoint_of_weights(run, tmp_path):
    """`mirage.load_checkpoint` finds the network in it, averaged where there is an average, and says so."""
    (path,) = checkpoints(tmp_path / "run")
    with pytest.warns(mirage.CheckpointWarning, match="averaged weights"):
        state = mirage.load_checkpoint(path)
    expected = run.average.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    other = mirage.load_checkpoint(path, key="state_dict.net")
    assert all(torch.equal(other[name], value) for name, value in run.network.state_dict().items())
    assert read_state(path).arguments == run.network.config
