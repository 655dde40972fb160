"""tools/first_light: tasks that crash, hang, fail and run out of memory are rows, and the rest goes on."""

import os
import re
import time
from pathlib import Path

import pytest
import torch

from tools.first_light import worker
from tools.first_light.pool import Pool, Task

STUB = (str(Path(__file__).with_name("first_light_stub.py")),)


def run(tmp_path, tasks, workers=1, seconds=60.0, **environment):
    rows = []
    pool = Pool({**os.environ, **environment}, tmp_path, rows.append, STUB)
    pool.run(tasks, workers, time.monotonic() + seconds)
    return rows


def task(kind, seconds=30.0, **arguments):
    return Task("a part", kind, arguments, seconds)


def test_a_process_takes_one_task_after_the_other(tmp_path):
    rows = run(tmp_path, [task("fine", number=1), task("fine", number=2)])
    assert rows[0] == {"part": "a part", "kind": "fine", "number": 1, "status": "ok", "process": rows[0]["process"]}
    assert [row["number"] for row in rows] == [1, 2] and rows[0]["process"] == rows[1]["process"]


def test_a_crash_keeps_what_was_said_and_the_next_task_has_another_process(tmp_path):
    first, crash, second = run(tmp_path, [task("crash"), task("fine")])
    assert first["status"] == second["status"] == "ok" and first["process"] != second["process"]
    assert crash["status"] == "crashed" and crash["problem"] == "SIGABRT: illegal address"


def test_a_hang_ends_at_its_limit(tmp_path):
    hang, second = run(tmp_path, [task("hang", seconds=0.5), task("fine")])
    assert hang["status"] == "timed out" and re.fullmatch(r"no result after \d+ s", hang["problem"])
    assert second["status"] == "ok"


def test_after_an_error_that_spoils_the_gpu_there_is_another_process(tmp_path):
    first, second, third = run(tmp_path, [task("spoil"), task("fine"), task("fine")])
    assert first["process"] != second["process"] == third["process"]


def test_what_is_not_reached_says_so(tmp_path):
    cut, last = run(tmp_path, [task("hang"), task("fine", number=2)], seconds=1.0)
    assert cut["status"] == "timed out" and cut["problem"].endswith("s, where the time of its part was over")
    assert last["number"] == 2 and last["status"] == "not reached"


def test_a_process_that_does_not_start_is_told_by_each_task(tmp_path):
    rows = run(tmp_path, [task("fine"), task("fine")], STUB="does not start")
    assert [row["status"] for row in rows] == ["crashed"] * 2
    assert rows[0]["problem"] == "exit status 3: no such library"


def test_every_task_runs_once_in_several_processes(tmp_path):
    rows = run(tmp_path, [task("crash" if number == 3 else "fine", number=number) for number in range(8)], workers=3)
    assert sorted(row["number"] for row in rows if row["status"] == "ok") == list(range(8))
    assert [row["number"] for row in rows if row["status"] == "crashed"] == [3]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a shape"), "failed"),
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (AssertionError(), "failed"),
    ],
)
def test_exceptions_are_rows_after_those_that_were_there(error, status):
    def kind(value):
        yield {"value": value}
        yield {"status": "wrong"}
        raise error

    rows = list(worker.attempt(kind, {"value": 7}))
    assert [row["status"] for row in rows] == ["ok", "wrong", status] and rows[0]["value"] == 7
    assert rows[2]["problem"] == f"{type(error).__name__}: {error}".strip()
    if status == "failed":
        assert rows[2]["at"].endswith(" kind")


def test_long_errors_keep_beginning_and_end():
    text = worker.shortened(RuntimeError("begin" + "x" * 5000 + "end"))
    assert text.startswith("RuntimeError: begin") and text.endswith("end") and len(text) < 700


def test_a_gpu_that_does_not_answer_is_not_used_again(monkeypatch):
    assert worker.cleaned_up()

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not worker.cleaned_up()
