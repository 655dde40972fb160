"""benchmarks/peers.py and worker.py: every PyTorch peer computes what the reference does, here and in a worker."""

import functools

import pytest
import torch

from benchmarks import networks, peers
from benchmarks.worker import Worker, WorkerError

SHAPE = (1, 3, 16, 16)


def _outputs(peer: str, mode: str) -> dict[str, torch.Tensor]:
    runner = peers.peer_of(mode, peer).build(peers.Problem(mode, "tiny", SHAPE, threads=1))
    return runner.outputs(runner.run())


@functools.cache
def _truth(mode: str) -> dict[str, torch.Tensor]:
    return _outputs(peers.TRUTH, mode)


@pytest.mark.parametrize("peer", ["eager", "channels_last", "autocast", "fast", "fast-bf16"])
def test_inference_is_that_of_the_reference(peer):
    expected = _truth("inference")
    assert expected["restored"].dtype == torch.float64
    ((name, error, relative),) = peers.errors(_outputs(peer, "inference"), expected)
    assert name == "restored" and error > 0
    assert relative <= peers.farthest(peers.peer_of("inference", peer), name)


def test_checkpointed_blocks_have_the_gradients_of_the_reference():
    expected = _outputs("eager", "step")
    assert expected["gradients"].numel() == sum(p.numel() for p in networks.make("tiny").parameters())
    for name, _, relative in peers.errors(_outputs("checkpoint", "step"), expected):
        assert relative < 1e-6, name


def test_checkpointing_reaches_every_block():
    model = peers.checkpoint_blocks(networks.make("tiny"))
    blocks = [m for m in model.modules() if type(m).__name__ == "TransformerBlock"]
    assert len(blocks) == 35 and all("forward" in vars(block) for block in blocks)


def test_errors_of_wrong_outputs():
    expected = {"loss": torch.tensor(2.0), "gradients": torch.tensor([3.0, 4.0])}
    outputs = {"loss": torch.tensor(2.5), "gradients": torch.tensor([3.0, 3.0])}
    assert list(peers.errors(outputs, expected)) == [("loss", 0.5, 0.25), ("gradients", 1.0, 0.2)]


def test_missing_packages_are_named():
    peer = peers.Peer("none", build=None, packages=("torch", "no_such_engine"))
    assert "no_such_engine" in peer.missing() and "torch" not in peer.missing().split(" not installed")[0]
    assert peers.INFERENCE["eager"].missing() == ""


def test_worker_times_passes_and_writes_outputs(tmp_path):
    output = tmp_path / "outputs.pt"
    worker = Worker("fast", peers.Problem("inference", "tiny", SHAPE, threads=1), output)
    try:
        assert worker.seconds(0.0) > 0 and worker.seconds(0.1) > 0
    finally:
        worker.close()
    ((_, _, relative),) = peers.errors(torch.load(output), _outputs("fast", "inference"))
    assert relative < 1e-6


def test_worker_that_fails_says_why(tmp_path):
    with pytest.raises(WorkerError, match="no such variant"):
        Worker("eager", peers.Problem("inference", "no such variant", SHAPE), tmp_path / "outputs.pt")


@pytest.mark.parametrize("peer", ["eager", "checkpoint", "fast-low", "fast-fast"])
def test_training_peers_have_the_gradients_of_the_reference(peer):
    found = peers.errors(_outputs(peer, "step"), _truth("step"))
    relative = {name: value for name, _, value in found}
    assert relative["loss"] < 1e-6 and 0 < relative["gradients"] < 1e-5
