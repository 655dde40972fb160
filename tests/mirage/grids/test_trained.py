"""Trainings kept on disk: once each, whoever asks, on the way resumed, several at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from grid_cases import FakeMeasure, FakeTrain, trainings

from mirage.grids import rank_groups, search_groups
from mirage.grids.performance import Performance, read_performance, write_performance
from mirage.grids.trained import TrainAndMeasure, TrainingFailed
from mirage.grids.workers import Stopped, Workers

AB, CD, ABCD = frozenset("ab"), frozenset("cd"), frozenset("abcd")
MATRIX = np.array([[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1.2], [2, 2, 1.2, 0]])


@pytest.fixture
def journal(tmp_path):
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal"


def store(tmp_path, journal, *, train=None, measure=None, **options):
    train = FakeTrain(str(journal)) if train is None else train
    return TrainAndMeasure(tmp_path / "groups", train, FakeMeasure() if measure is None else measure, **options)


def test_a_search_trains_what_it_needs_and_the_next_one_nothing(tmp_path, journal):
    performance = store(tmp_path, journal)
    assert isinstance(performance, Performance)
    found = search_groups(list("abcd"), performance, ranking=rank_groups(list("abcd"), MATRIX))
    assert found.groups == (("a", "b"), ("c", "d")) and found.drops == pytest.approx({"a+b": 0.2, "c+d": 0.3})
    assert len(trainings(journal)) == len(set(trainings(journal))) == sum(found.trainings.values())
    assert found.trainings["single"] == 4
    for again in (performance, store(tmp_path, journal)):  # what it remembers, and what is on disk
        other = search_groups(list("abcd"), again, ranking=rank_groups(list("abcd"), MATRIX))
        assert other.groups == found.groups and sum(other.trainings.values()) == 0
    assert len(trainings(journal)) == sum(found.trainings.values())


def test_results_on_disk(tmp_path, journal):
    performance = store(tmp_path, journal)
    assert not performance.is_known(AB) and list(performance.known()) == []
    assert performance.measure([frozenset("ba")]) == [{"a": 29.8, "b": 29.8}]
    content = json.loads((tmp_path / "groups" / "a+b" / "result.json").read_text())
    assert content["pictures"]["a"] == [28.8, 30.8] and content["psnr"]["b"] == 29.8
    assert list(store(tmp_path, journal).known()) == [AB]
    write_performance(performance, tmp_path / "table.csv", list("abcd"))
    assert read_performance(tmp_path / "table.csv").values == {AB: {"a": 29.8, "b": 29.8}}
    [weights] = performance.weights_of([AB])
    assert weights == tmp_path / "groups" / "a+b" / "weights.safetensors" and trainings(journal) == ["a+b"]
    weights.unlink()  # a result without weights still is one, and weights come again where they are wanted
    assert performance.is_known(AB)
    performance.weights_of([AB, CD])
    assert weights.exists() and trainings(journal) == ["a+b", "a+b", "c+d"]


def test_training_alone_needs_no_pictures(tmp_path, journal):
    performance = TrainAndMeasure(tmp_path / "groups", FakeTrain(str(journal)))
    assert all(path.exists() for path in performance.weights_of([AB, CD]))
    with pytest.raises(ValueError, match="measure: expected what to measure with, got None"):
        performance.measure([AB])
    assert store(tmp_path, journal).measure([AB]) == [{"a": 29.8, "b": 29.8}]  # measured later, trained once
    assert trainings(journal) == ["a+b", "c+d"]


def test_failures_are_told_after_the_others_are_done(tmp_path, journal):
    failing = FakeTrain(str(journal), fails=("a+b",))
    performance = store(tmp_path, journal, train=failing)
    with pytest.raises(TrainingFailed, match=r"1 of 2 groups: a\+b: step 3: not finite"):
        performance.measure([AB, CD])
    assert performance.is_known(CD) and not performance.is_known(AB)
    assert store(tmp_path, journal).measure([AB])[0] is not None


@pytest.mark.parametrize("change, sentence", [
    (lambda path: path.write_text("{"), r"result\.json: not readable as a result: .*delete it"),
    (lambda path: path.write_text("{}"), r"result\.json: not readable as a result: 'psnr'"),
    (lambda path: path.write_text('{"psnr": {"a": 1}}'), r"expected finite PSNR of a\+b, got \{'a': 1\.0\}"),
    (lambda path: path.write_text('{"psnr": {"a": 1, "b": NaN}}'), r"expected finite PSNR of a\+b"),
])  # fmt: skip
def test_damaged_results_are_told(tmp_path, journal, change, sentence):
    store(tmp_path, journal).measure([AB])
    change(tmp_path / "groups" / "a+b" / "result.json")
    with pytest.raises(ValueError, match=sentence):
        store(tmp_path, journal).measure([AB])


def test_other_settings_are_refused(tmp_path, journal):
    store(tmp_path, journal)
    store(tmp_path, journal, workers=3)
    with pytest.raises(ValueError, match=r"trainings of other settings \(train\.settings: 0 there, 1 here\); name ano"):
        store(tmp_path, journal, train=FakeTrain(str(journal), settings=1))
    with pytest.raises(ValueError, match=r"\(measure\.value: 30\.0 there, 31\.0 here\)"):
        store(tmp_path, journal, measure=FakeMeasure(31.0))
    TrainAndMeasure(tmp_path / "groups", FakeTrain(str(journal)))  # without measuring
    (tmp_path / "groups" / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="settings.json: not readable as the settings of trainings"):
        store(tmp_path, journal)


def test_several_at_a_time_in_processes(tmp_path, journal):
    begun, done = [], []
    train = FakeTrain(str(journal), wait=0.3, fails=("a+d",))
    performance = store(tmp_path, journal, train=train, workers=2, on_begin=begun.append, on_done=done.append)
    assert performance.parallel == 2
    with pytest.raises(TrainingFailed, match=r"1 of 3 groups: a\+d: step 3"):
        performance.measure([AB, frozenset("ad"), CD])
    assert trainings(journal) == ["a+b", "a+d", "c+d"]
    processes = {path.name.split("-")[1] for path in journal.iterdir()}
    assert str(os.getpid()) not in processes and len(processes) <= 2
    assert begun == ["a+b", "a+d", "c+d"] and sorted(done) == sorted(begun)
    assert performance.measure([AB, CD]) == [{"a": 29.8, "b": 29.8}, {"c": 29.7, "d": 29.7}]


def test_a_killed_process_is_told_and_gone_on_from(tmp_path, journal):
    train = FakeTrain(str(journal), kills=("a+b",))
    with pytest.raises(TrainingFailed, match="its process was ended from outside.*goes on from what is done"):
        store(tmp_path, journal, train=train, workers=2).measure([AB, CD])
    found = store(tmp_path, journal, train=train).measure([AB, CD])
    assert found == [{"a": 29.8, "b": 29.8}, {"c": 29.7, "d": 29.7}]
    assert trainings(journal).count("a+b") == 2  # the first one was lost with its process, and its lock opened


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
sys.path[:0] = {paths!r}
from grid_cases import FakeMeasure, FakeTrain
from mirage.grids.trained import TrainAndMeasure

if __name__ == "__main__":
    train = FakeTrain({journal!r}, wait={wait})
    performance = TrainAndMeasure({folder!r}, train, FakeMeasure(), workers={workers})
    print("ready", flush=True)
    print(performance.measure([frozenset("ab"), frozenset("cd")]))
else:
    one = Path({folder!r}, f"started-{{os.getpid()}}")
    one.touch()
    while {late} and not one.with_name("go on").exists():
        time.sleep(0.01)
"""
LONG = 600  # seconds: far more than any of these tests takes where other processes take most of the machine
PATIENCE = 200


@contextlib.contextmanager
def process(tmp_path, journal, *, wait, workers=1, late=False):
    """A process that trains two groups; its workers, if they are `late`, begin once there is "go on"."""
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]
    folder = tmp_path / "groups"
    text = SCRIPT.format(paths=paths, journal=str(journal), wait=wait, folder=str(folder), workers=workers, late=late)
    script = tmp_path / "train.py"
    script.write_text(text)
    command = [sys.executable, str(script)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()  # which workers that are still there would keep open


def wait_for(condition, what, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def test_two_processes_at_once_train_each_group_once(tmp_path, journal):
    with process(tmp_path, journal, wait=1) as other:
        wait_for(lambda: trainings(journal) == ["a+b"], "the other one begins")
        found = store(tmp_path, journal, train=FakeTrain(str(journal), wait=0.1)).measure([AB, CD])
        output, errors = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0, errors
    assert output.splitlines() == ["ready", str(found)] and found[0] == {"a": 29.8, "b": 29.8}
    assert trainings(journal) == ["a+b", "c+d"]


def started(tmp_path):
    return {int(path.name.split("-")[1]) for path in (tmp_path / "groups").glob("started-*")}


def test_workers_end_with_the_process_that_asked_for_them(tmp_path, journal):
    with process(tmp_path, journal, wait=LONG, workers=2) as first:
        wait_for(lambda: len(trainings(journal)) == 2, "two trainings begin")
        first.send_signal(signal.SIGKILL)
        first.wait()
        wait_for(lambda: not any(map(is_running, started(tmp_path))), "workers end")
    assert store(tmp_path, journal).measure([AB, CD])[0] == {"a": 29.8, "b": 29.8}


def test_ctrl_c_stops_the_workers_too(tmp_path, journal):
    with process(tmp_path, journal, wait=LONG, workers=2) as first:
        wait_for(lambda: len(trainings(journal)) == 2, "two trainings begin")
        first.send_signal(signal.SIGINT)
        output = first.communicate(timeout=PATIENCE)
    assert first.returncode not in (0, None) and "KeyboardInterrupt" in output[1]
    assert len(started(tmp_path)) == 2 and not any(map(is_running, started(tmp_path)))
    assert not (tmp_path / "groups" / "a+b" / "result.json").exists()


def test_ctrl_c_stops_workers_that_are_still_starting(tmp_path, journal):
    with process(tmp_path, journal, wait=LONG, workers=2, late=True) as first:
        wait_for(lambda: len(started(tmp_path)) == 2, "two workers start")
        first.send_signal(signal.SIGINT)
        time.sleep(0.5)
        (tmp_path / "groups" / "go on").touch()
        output = first.communicate(timeout=PATIENCE)
    assert first.returncode not in (0, None) and "KeyboardInterrupt" in output[1]
    assert not any(map(is_running, started(tmp_path))) and not list(tmp_path.glob("groups/*/result.json"))


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_an_interrupted_training_stops_the_rest(tmp_path, journal):
    from mirage.train import Interrupted

    class Stopping(FakeTrain):
        def __call__(self, group, folder, weights):
            raise Interrupted("stopped at step 5, which is saved in run")

    with pytest.raises(Stopped, match="stopped at step 5"):
        store(tmp_path, journal, train=Stopping(str(journal))).measure([AB, CD])
    assert issubclass(Stopped, KeyboardInterrupt)


@pytest.mark.parametrize("options, error, sentence", [
    ({"engine": "slurm"}, ValueError, "engine: expected one of local, ray, got 'slurm'"),
    ({"count": 0}, ValueError, "workers: expected 1 or more, got 0"),
])  # fmt: skip
def test_what_is_wrong_with_workers_is_told(options, error, sentence):
    with pytest.raises(error, match=sentence):
        Workers(**options)


def test_progress_is_read_from_the_trainers_log(tmp_path, journal):
    performance = store(tmp_path, journal)
    assert performance.step_of("b+a") == 0
    run = tmp_path / "groups" / "a+b" / "run"
    run.mkdir(parents=True)
    (run / "train.csv").write_text("step,loss\n50,0.1\n100,0.05\n")
    assert performance.step_of("b+a") == 100


def test_on_a_cluster_of_ray(tmp_path, journal):
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    root = Path(__file__).resolve().parents[3]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    paths = os.pathsep.join([str(root), str(root / "tests")])
    ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": paths}})  # fmt: skip
    try:
        train = FakeTrain(str(journal), fails=("a+d",), kills=("a+b",))
        performance = store(tmp_path, journal, train=train, workers=Workers(2, "ray"))
        with pytest.raises(TrainingFailed, match=r"1 of 3 groups: a\+d: step 3: not finite"):
            performance.measure([AB, frozenset("ad"), CD])
    finally:
        ray.shutdown()
    processes = {path.name.split("-")[1] for path in journal.iterdir()}
    assert str(os.getpid()) not in processes
    assert trainings(journal) == ["a+b", "a+b", "a+d", "c+d"]  # a worker was killed, and its group tried again
    assert performance.measure([AB, CD]) == [{"a": 29.8, "b": 29.8}, {"c": 29.7, "d": 29.7}]
