"""benchmarks/networks.py: of every network of the family, tiny, each peer computes what the reference does."""

import os

import pytest
import torch

from benchmarks import networks, peers
from benchmarks import test_cpu_peers as suite

CODE = os.environ.get("MIRAGE_RELEASED_NETWORKS", "")
FAMILY = [name for name in networks.NETWORKS if name not in networks.MIRAGES]
SHAPE = (1, 3, 16, 24)


def _problem(name: str, mode: str, folder: str = "") -> peers.Problem:
    if problem := networks.NETWORKS[name].missing(CODE):
        pytest.skip(problem)
    return peers.Problem(mode, name, SHAPE, threads=1, folder=folder, code=CODE, trial=True)


def _relative_errors(peer: str, problem: peers.Problem, against: str) -> dict[str, float]:
    runners = [peers.peer_of(problem.mode, name).build(problem) for name in (peer, against)]
    outputs, expected = (runner.outputs(runner.run()) for runner in runners)
    return {name: relative for name, _, relative in peers.errors(outputs, expected)}


@pytest.mark.filterwarnings("ignore:accelerate. nothing in")
@pytest.mark.parametrize("name", FAMILY)
def test_inference_is_that_of_the_reference(name):
    problem = _problem(name, "inference")
    peers_there = [peer for peer in ("eager", "fast", "fast-bf16") if peer not in networks.NETWORKS[name].without]
    for peer in peers_there:
        limit = peers.farthest(peers.INFERENCE[peer], "restored")
        assert 0 < _relative_errors(peer, problem, peers.TRUTH)["restored"] <= limit, peer


@pytest.mark.filterwarnings("ignore:accelerate. nothing in")
@pytest.mark.parametrize("name", FAMILY)
def test_a_step_is_that_of_the_reference(name):
    found = _relative_errors("fast-low", _problem(name, "step"), peers.TRUTH)
    assert found["loss"] < 1e-5 and 0 < found["gradients"] < 1e-4


@pytest.mark.parametrize("name", [n for n in FAMILY if "openvino-f32" not in networks.NETWORKS[n].without])
def test_openvino_computes_the_reference(name, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    errors = _relative_errors("openvino-f32", _problem(name, "inference", str(tmp_path)), "eager")
    assert errors["restored"] <= peers.FARTHEST["float32"]


def test_nothing_starts_as_the_identity():
    """NAFNet's blocks are multiplied by 0 at first, and no error of theirs would be seen."""
    model = networks.make("nafnet32", trial=True)
    assert all(p.std() > 0 for p in model.parameters() if p.numel() > 1)
    again = networks.make("nafnet32", trial=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_draws_are_the_same_in_both_precisions():
    like = torch.zeros(3)
    with networks.repeatable("moce-ir-s", torch.float32):
        first = torch.randn_like(like)
    with networks.repeatable("moce-ir-s", torch.float64):
        assert torch.equal(torch.randn_like(like.double()), first.double())
        assert torch.zeros(1).dtype == like.float().dtype == torch.float64
    assert torch.zeros(1).dtype == like.double().float().dtype == torch.float32, "as before"


def test_the_problems_are_those_of_the_table():
    """Every network is timed by each of its peers at each of its sizes, and none that it cannot run."""
    timed = {(case.variant, case.size, case.peer) for case in suite.timed("inference")}
    for size in ("1x3x256x256", "1x3x512x512"):
        assert {("restormer", size, peer) for peer in ("eager", "openvino-f32", "fast")} <= timed
    assert ("adair", "1x3x256x256", "openvino-f32") in timed and ("nafnet64", "1x3x512x512", "fast") in timed
    remembered = {(case.variant, case.mode, case.size) for case in suite.MEMORY}
    assert {(name, "inference", "1x3x1024x1536") for name in networks.NETWORKS} <= remembered
    assert ("restormer", "forward", "1x3x224x224") in remembered
    assert networks.NETWORKS["moce-ir-s"].without.keys() == {"openvino-f32", "fast-bf16"}
    assert not networks.NETWORKS["adair"].without
    assert networks.NETWORKS["adair"].missing("").startswith("no folder of checkouts was given")
