"""Two processes (gloo, CPU) against one: losses, gradients and weights; a head used or not; stopping together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_processes
from train_cases import record, settings, write_pictures

from mirage.train import Run, read_state
from mirage.train.state import checkpoints

fabric_module = pytest.importorskip("lightning_fabric", reason="the extra [train] is not installed")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    write_pictures(root / "clean")
    return root


@pytest.fixture(scope="module")
def ranks(root):
    """What the two processes found, by rank."""
    settings(root)  # writes the file that both read
    fabric = fabric_module.Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    fabric.launch(train_processes.work, root)
    return [torch.load(root / f"rank{rank}.pt") for rank in range(2)]


def close(found, expected, tolerance=2e-5):
    """By the norm of each tensor; those of rounding alone (a gradient of zero) by that of all."""
    expected = {name: value.detach() for name, value in expected.items() if value.is_floating_point()}
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        limit = tolerance * max(float(value.norm()), 1e-3 * scale)
        assert float((found[name] - value).norm()) <= limit, name


def test_loss_and_gradients_of_two_processes_are_those_of_one(root, ranks):
    """With batch norm's statistics fixed, as nothing else depends on how the batch is divided: InfoNCE is gathered."""
    expected = record(train_processes.begin(root, "fixed"), 3)
    first, second = (rank["fixed"] for rank in ranks)
    for step in range(3):
        a, b, whole = (record["values"][step] for record in (first, second, expected))
        assert a["contrastive"] == pytest.approx(b["contrastive"], rel=1e-6)
        assert a["contrastive"] == pytest.approx(whole["contrastive"], rel=1e-5)
        for name in ("l1", "fourier", "loss"):
            assert (a[name] + b[name]) / 2 == pytest.approx(whole[name], rel=1e-5)
        close(first["gradients"][step], expected["gradients"][step], 2e-4 if step else 2e-5)
    assert first["gradients"][0]["spd_proj_shallow.weight"].abs().max() > 0
    close(first["weights"], expected["weights"], 1e-3)


def test_or_those_of_one_process_that_runs_the_halves_of_the_batch(root, ranks):
    """Batch norm has each process's own statistics, as in the released code; the contrast is of the whole batch."""
    run = train_processes.begin(root, "trained")
    samples = [run.data[number] for number in range(4)]
    halves = [torch.stack([s[i] for s in samples[at : at + 2]]) for at in (0, 2) for i in (0, 1)]
    a, b = (run.network(degraded, return_spd=True) for degraded in (halves[0], halves[2]))
    z = tuple(torch.cat([x, y]) for x, y in zip(a[1], b[1], strict=True))
    losses = [run.loss((out[0], z), clean)[0] for out, clean in ((a, halves[1]), (b, halves[3]))]
    (sum(losses) / 2).backward()
    expected = {name: p.grad for name, p in run.network.named_parameters()}
    for rank, loss in zip(ranks, losses, strict=True):
        assert rank["trained"]["values"][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        close(rank["trained"]["gradients"][0], expected)


@pytest.mark.parametrize("name", ["fixed", "trained", "unused", "absent"])
def test_processes_agree_on_the_weights_without_finding_unused_parameters(ranks, name):
    a, b = (rank[name]["weights"] for rank in ranks)
    learned = [key for key in ranks[0][name]["gradients"][0]]
    assert all(torch.equal(a[key], b[key]) for key in learned)
    head = [key for key in learned if key.startswith(("reduce_shallow", "reduce_latent", "spd_proj"))]
    assert len(head) == (8 if name in ("fixed", "trained") else 0)
    assert ("spd_proj_latent.weight" in a) == (name != "absent")


def test_one_process_goes_on_from_the_checkpoint_of_two(root, ranks):
    run = train_processes.begin(root, "absent")
    assert run.step == 3 and run.samples == 12
    assert all(
        torch.equal(value, ranks[0]["absent"]["weights"][key]) for key, value in run.network.state_dict().items()
    )
    record(run, 1)
    assert run.step == 4


def test_what_is_not_finite_in_one_process_stops_both(ranks):
    (first, skipped_first), (second, skipped_second) = (rank["messages"] for rank in ranks)
    assert "not finite (of another process)" in first and "not finite: loss nan" in second
    assert all(".png" in message for message in (first, second))
    assert skipped_first == skipped_second == [{}]
    assert [rank["steps-skip"] for rank in ranks] == [1, 1]


def test_the_command_starts_its_processes(root, ranks):
    """`mirage train` with two devices: the same weights, bit for bit, as the two processes above."""
    overrides, _ = train_processes.CASES["passes"]
    settings(root)
    command = [sys.executable, "-m", "mirage.cli", "train", str(root / "config.yaml"), f"data.root={root}"]
    command += [*train_processes.COMMON, *overrides, f"output.folder={root / 'command'}"]
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "trainer.devices=2", "trainer.strategy=ddp"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples an epoch") == 1  # told once
    (path,) = checkpoints(root / "command")
    state = read_state(path)
    assert state.step == 6 and state.samples == 24
    expected = ranks[0]["passes"]["weights"]
    assert all(torch.equal(value, expected[key]) for key, value in state.network.items())


def test_a_batch_that_cannot_be_shared_is_refused(root):
    run = Run(settings(root, "data.batch=3", "trainer.accumulate=2", out="odd"))
    with pytest.raises(ValueError, match=r"data.batch: expected a multiple of .*\(1 x 2\), got 3"):
        run.train()
