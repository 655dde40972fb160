"""Checkpoints: every format and prefix, one complete error, nothing half-loaded or half-written, no code run."""

import argparse
import os
import pathlib
import stat

import pytest
import safetensors.torch
import torch
from golden import load_golden_weights, mirage_mini

import mirage
from mirage import CheckpointError, from_checkpoint, load_checkpoint, save_checkpoint


def assert_same(state: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    own = model.state_dict()
    assert list(state) == list(own) or set(state) == set(own)
    assert all(torch.equal(state[key], own[key]) for key in own)


@pytest.fixture(scope="module")
def model() -> mirage.MIRAGE:
    return load_golden_weights(mirage_mini())


def lightning(state: dict[str, torch.Tensor], prefix: str = "net.") -> dict:
    """What Lightning's ModelCheckpoint writes around the weights."""
    return {
        "epoch": 129,
        "global_step": 1000,
        "pytorch-lightning_version": "2.0.1",
        "state_dict": {prefix + key: value for key, value in state.items()},
        "hyper_parameters": {"opt": argparse.Namespace(lr=2e-4, de_type=["derain"])},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 2e-4}]}],
    }


@pytest.mark.parametrize("prefix", ["", "net.", "module.", "net.module.", "module.net.", "net._orig_mod.", "net.net."])
@pytest.mark.parametrize("name", ["last.ckpt", "weights.pth", "weights.safetensors"])
def test_formats_and_prefixes(name: str, prefix: str, model, tmp_path) -> None:
    state = {prefix + key: value for key, value in model.state_dict().items()}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(lightning(model.state_dict(), prefix) if path.suffix == ".ckpt" else state, path)
    assert_same(load_checkpoint(path), model)
    other = mirage_mini()
    load_checkpoint(str(path), other)
    assert_same(other.state_dict(), model)


@pytest.mark.parametrize(("build", "dim"), [(mirage.mirage_tiny, 24), (mirage.mirage_small, 30)], ids=["T", "S"])
def test_from_checkpoint_tells_t_from_s(build, dim: int, tmp_path) -> None:
    source = build()
    torch.save(lightning(source.state_dict()), tmp_path / "released.ckpt")
    loaded = from_checkpoint(tmp_path / "released.ckpt", drop_path=0.0)
    assert loaded.config["dim"] == dim and loaded.config["drop_path"] == 0.0 and not loaded.training
    assert_same(loaded.state_dict(), source)


def test_from_checkpoint_without_the_spd_head(tmp_path) -> None:
    source = mirage.mirage_tiny(spd=False)
    torch.save(source.state_dict(), tmp_path / "small.pth")
    loaded = from_checkpoint(tmp_path / "small.pth")
    assert loaded.config["spd"] is False
    assert_same(loaded.state_dict(), source)


def test_save_and_from_checkpoint_round_trip(model, tmp_path) -> None:
    path = tmp_path / "mini.safetensors"
    save_checkpoint(model, path)
    loaded = from_checkpoint(path)
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model)
    assert [p.name for p in tmp_path.iterdir()] == ["mini.safetensors"]
    assert set(safetensors.torch.load_file(path)) == set(model.state_dict())


def test_save_unwraps(model, tmp_path) -> None:
    save_checkpoint(torch.nn.DataParallel(model), tmp_path / "wrapped.safetensors")
    assert from_checkpoint(tmp_path / "wrapped.safetensors").config == model.config
    target = torch.nn.DataParallel(mirage_mini())
    load_checkpoint(tmp_path / "wrapped.safetensors", target)
    assert_same(target.module.state_dict(), model)


def test_one_error_names_every_problem_and_changes_nothing(model, tmp_path) -> None:
    state = dict(model.state_dict())
    del state["output.weight"], state["latent.0.attn.temperature"]
    state["extra.weight"] = torch.ones(1)
    state["patch_embed.proj.weight"] = torch.ones(13, 3, 3, 3)
    torch.save(state, tmp_path / "bad.pth")
    target = mirage_mini()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "bad.pth", target)
    message = str(caught.value)
    assert "2 missing: latent.0.attn.temperature, output.weight" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 mis-shaped: patch_embed.proj.weight (expected [12, 3, 3, 3], got [13, 3, 3, 3])" in message
    assert "bad.pth" in message
    assert_same(before, target)


def test_long_lists_are_cut_and_counted(tmp_path) -> None:
    torch.save({"patch_embed.proj.weight": torch.ones(24, 3, 3, 3)}, tmp_path / "stub.pth")
    with pytest.raises(CheckpointError, match=r"\d+ missing: .*, and \d+ more"):
        from_checkpoint(tmp_path / "stub.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "got an empty mapping"),
        ([1, 2], "got list"),
        ({"state_dict": {"a": 3}}, "do not: 'a'"),
        ({"epoch": 3, "net.a": torch.ones(1)}, "do not: 'epoch'"),
        ({"net.a": torch.ones(1), "a": torch.ones(1)}, "more than one entry for 'a'"),
    ],
    ids=["empty", "list", "numbers", "mixed", "collision"],
)
def test_no_state_dict(content, message: str, tmp_path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(1)}, "no such key; the keys are a"),
        ({"patch_embed.proj.weight": torch.ones(24)}, r"got \[24\]"),
        ({"patch_embed.proj.weight": torch.ones(36, 3, 3, 3)}, "dim 36 belongs to neither"),
    ],
    ids=["foreign", "flat", "other-dim"],
)
def test_from_checkpoint_refuses_other_models(state, message: str, tmp_path) -> None:
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        from_checkpoint(tmp_path / "x.pth")


def test_stored_arguments_that_build_nothing(tmp_path) -> None:
    for config, message in (('{"dim": 7}', "dim must be"), ("[]", "must be a mapping"), ("{", "not a readable")):
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file({"a": torch.ones(1)}, path, {"mirage_config": config})
        with pytest.raises(CheckpointError, match=message):
            from_checkpoint(path)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_no_code_is_run(model, tmp_path, zipped: bool) -> None:
    content = lightning(model.state_dict())
    content["callbacks"] = Trap(tmp_path / "run")
    torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="can run code.*If you trust its source"):
        load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.safetensors"])
@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_damaged_files(name: str, kind: str, tmp_path) -> None:
    path = tmp_path / name
    state = {"a": torch.ones(1000)}
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"404: not found\n" * 9, "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_absent_file_and_folder(model, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint file at .*absent.ckpt"):
        load_checkpoint(tmp_path / "absent.ckpt")
    with pytest.raises(FileNotFoundError):
        save_checkpoint(model, tmp_path / "absent" / "x.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_checkpoint(model, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(failing: str, model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_written_file_obeys_umask_and_links(model, tmp_path) -> None:
    (tmp_path / "real.safetensors").write_bytes(b"old")
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    save_checkpoint(model, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert_same(load_checkpoint(tmp_path / "real.safetensors"), model)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "real.safetensors").stat().st_mode) == 0o666 & ~umask


def test_dtype_of_the_model_is_kept(model, tmp_path) -> None:
    save_checkpoint(model, tmp_path / "x.safetensors")
    target = mirage_mini().to(torch.bfloat16)
    load_checkpoint(tmp_path / "x.safetensors", target)
    assert target.output.weight.dtype == torch.bfloat16
    assert torch.equal(target.output.weight, model.output.weight.bfloat16())
