"""benchmarks/test_cpu_peers.py: peers are timed in turn, after what they compute was compared with the reference."""

import pytest
import torch

from benchmarks import peers, worker
from benchmarks import test_cpu_peers as suite
from benchmarks.replay import Clock
from benchmarks.worker import WorkerError

SHAPE = (1, 3, 16, 16)
OPTIONS = suite.Options(threads=1, seconds=0)


def _cases(*names: str) -> list[suite.Case]:
    return [suite.Case("a round", name, "inference", "tiny", SHAPE) for name in names]


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    """What the reference computes is kept here, as from run to run."""
    return tmp_path_factory.mktemp("truths")


def test_cases_of_a_round_are_measured_together(tmp_path, truths, monkeypatch):
    order = []
    seconds = suite.Worker.seconds
    monkeypatch.setattr(suite.Worker, "seconds", lambda self, at_least: order.append(id(self)) or seconds(self, 0.0))
    fast, channels_last = cases = _cases("fast", "channels_last")
    rounds = suite.Rounds(cases, tmp_path, truths, OPTIONS)
    samples, facts = rounds.measured(fast)
    assert len(samples) == suite.ROUNDS[0] and min(samples) > 0
    assert 0 < facts["relative_error_restored"] < 1e-4
    taken = len(order)
    assert len(rounds.measured(channels_last)[0]) == suite.ROUNDS[0] and len(order) == taken  # already there
    assert order == order[:2] * (1 + suite.ROUNDS[0]) and order[0] != order[1]  # one to warm up, then in turn


def test_a_peer_that_computes_something_else_fails(tmp_path, truths, monkeypatch):
    monkeypatch.setitem(peers.FARTHEST, "float32", 0.0)
    rounds = suite.Rounds(_cases("fast"), tmp_path, truths, OPTIONS)
    with pytest.raises(WorkerError, match="fast does not compute what the reference does: restored is"):
        rounds.measured(_cases("fast")[0])


def test_a_turn_is_the_median_of_its_second_half(monkeypatch):
    now, durations = [100.0], iter((9.0, 0.2, 0.6, 0.4, 0.3, 5.0))
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(durations)

    assert worker.turn(run, at_least=10.3) == pytest.approx(0.35)  # begun at 0, 9, 9.2, 9.8 and 10.2
    assert worker.turn(run, at_least=2.0) == pytest.approx(5.0)  # alone


def test_the_truth_is_kept(tmp_path, monkeypatch):
    (case,) = _cases("fast")
    (tmp_path / "truths").mkdir()
    first = suite.Rounds([case], tmp_path, tmp_path / "truths", OPTIONS)._expected(case)
    monkeypatch.setattr(suite, "Worker", None)  # nothing is computed again
    again = suite.Rounds([case], tmp_path, tmp_path / "truths", OPTIONS)._expected(case)
    assert torch.equal(first["restored"], again["restored"]) and first["restored"].dtype == torch.float64


def test_the_clock_replays_samples():
    clock = Clock()
    clock.samples = iter((0.5, 0.25))
    start = clock.read()
    clock.advance()
    assert clock.read() == start + 0.5
    clock.advance()
    assert clock.read() == start + 0.75


def test_ids_are_unique():
    for cases in (suite.timed("inference"), suite.timed("step"), suite.SCALING, suite.MEMORY):
        assert len({str(case) for case in cases}) == len(cases) > 0
