"""benchmarks/measured.py with engines that answer at once: what becomes of times, memory and results."""

import pytest
import torch

from benchmarks import measured

TIMES = {
    "eager": (3.0, 1.0, 2.0),
    "openvino-f32": (4.0, 4.0, 4.0),
    "fast": (0.5, 0.25, 0.75),
    "fast-bf16": (1.0, 1.0, 1.0),
}


@pytest.fixture
def engines(monkeypatch):
    """The result that each engine gives, by name; all the same until a test changes one."""
    results = dict.fromkeys(TIMES, 1.0)

    class Worker:
        def __init__(self, name, problem, output):
            self.times = iter(TIMES[name])
            torch.save({"restored": torch.full((2,), results[name])}, output)

        def seconds(self, at_least):
            assert at_least == measured.TURN_SECONDS
            return next(self.times)

        def close(self):
            pass

    def fresh(name, problem, tracked):
        assert not tracked and problem.size == "1x3x8x8"
        return {"rss_mib": 10.0 * (1 + list(TIMES).index(name))}

    monkeypatch.setattr(measured, "Worker", Worker)
    monkeypatch.setattr(measured.peak_memory, "measure_fresh", fresh)
    monkeypatch.setattr(measured.peers_of("inference")["eager"].__class__, "missing", lambda peer: "")
    return results


def _measure(folder):
    return {row["peer"]: row for row in measured.measure("inference", "tiny", (1, 3, 8, 8), 3, 2, folder)}


def test_rows(engines, tmp_path):
    engines["fast-bf16"] = 1.01
    rows = _measure(tmp_path)
    assert list(rows) == list(TIMES)
    assert [rows["eager"][key] for key in ("ms", "ms_min", "ms_max", "mib", "difference")] == [2e3, 1e3, 3e3, 10, 0]
    assert (rows["fast"]["ms"], rows["fast"]["mib"], rows["fast"]["rounds"]) == (500, 30, 3)
    assert rows["fast-bf16"]["difference"] == pytest.approx(0.01, abs=1e-6)


def test_an_engine_that_computes_something_else_ends_the_run(engines, tmp_path):
    engines["fast"] = 1.01  # within what is allowed to bfloat16, not to float32
    with pytest.raises(SystemExit, match="mirage.fast, inference tiny 1x3x8x8: restored not as eager's"):
        _measure(tmp_path)


def test_an_engine_that_is_not_installed_is_named(engines, monkeypatch, tmp_path):
    monkeypatch.setattr(measured.peers_of("inference")["eager"].__class__, "missing", lambda peer: "not installed")
    with pytest.raises(SystemExit, match="PyTorch eager: not installed"):
        _measure(tmp_path)


def test_what_is_asked_for_exists():
    for mode, variant, shape, rounds in measured.PROBLEMS:
        names = measured.INFERENCE if mode == "inference" else measured.STEP
        assert set(names) <= measured.peers_of(mode).keys() and variant in ("tiny", "small")
        assert shape[2] % 8 == shape[3] % 8 == 0 and rounds >= 3
