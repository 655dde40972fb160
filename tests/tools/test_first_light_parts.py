"""tools/first_light: the plan for a GPU fits the functions and shapes that it names, and what they read and write."""

import contextlib
import inspect
import json
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from mirage_kernels._runtime.cases import operators
from tools.first_light import building, plan, report, safety, speed, truth
from tools.first_light.worker import KINDS

ON_GPU, DRY = plan.on_gpu(), plan.dry()


@pytest.mark.parametrize("parts", [ON_GPU, DRY], ids=["gpu", "dry"])
def test_every_task_fits_its_function_and_travels_as_json(parts):
    for part in parts:
        assert part.tasks and part.workers >= 1
        for task in part.tasks:
            inspect.signature(KINDS[task.kind]).bind(**task.arguments)
            assert json.loads(json.dumps(task.arguments)) == task.arguments
            assert task.seconds > 0 and task.part == part.name


def test_both_plans_have_the_same_parts_and_kinds():
    assert [part.name for part in ON_GPU] == [part.name for part in DRY]
    for part, dry in zip(ON_GPU, DRY, strict=True):
        kinds, tried = ({task.kind for task in p.tasks} for p in (part, dry))
        assert kinds - tried <= {"golden"} and part.beside_build == dry.beside_build


def test_the_plan_takes_ten_minutes_at_most():
    assert sum(part.seconds for part in ON_GPU) <= 575
    beside = [part.beside_build for part in ON_GPU]
    assert beside == sorted(beside, reverse=True)
    assert sum(part.seconds for part in ON_GPU if part.beside_build) <= plan.BUILD_SECONDS


def test_the_plan_misses_no_operator_dtype_size_and_width():
    seen = {}
    for task in (task for part in ON_GPU for task in part.tasks if task.kind == "operator"):
        a = task.arguments
        seen.setdefault((a["implementation"], a["name"], a["mode"], a["dtype"]), set()).add(a["size"])
    for op in operators():
        for implementation in {"triton", "cuda"} & set(op.implementations):
            for dtype in plan.DTYPES:
                sizes = seen[implementation, op.name, op.mode, dtype]
                assert {"small", "64x64", "256x256"} <= sizes
                if op.is_stage and op.gradients and dtype != "float16":
                    assert {f"{n} channels" for n in (24, 48, 96, 192, 30, 60, 120, 240)} <= sizes


def test_shapes_are_those_that_the_operators_take():
    shapes = {
        (task.arguments["name"], task.arguments["mode"], tuple(task.arguments["shape"]))
        for part in ON_GPU
        for task in part.tasks
        if task.kind in ("operator", "repeats")
    }
    for name, mode, shape in shapes:
        case = truth.case_of(name, mode)
        tensors = case.without_memory(shape)
        assert len(tensors) == len(case.arguments) and case.reference(*tensors).device.type == "meta"


def test_peers_variants_and_levels_are_known():
    for task in (task for part in ON_GPU for task in part.tasks):
        a = task.arguments
        if task.kind in ("inference", "ahead"):
            assert a["peer"] in (*gpu.PEERS, *gpu.MODES) and a["variant"] in gpu.BUILDERS
        elif task.kind == "step":
            assert a["peer"] in gpu.STEP_PEERS and a["variant"] in gpu.BUILDERS
        elif task.kind in ("stage", "warm"):
            channels, heads, *_ = a["level"]
            assert len(a["level"]) == 4 and channels % (3 * heads) == 0 and a["half"] in plan.HALVES
        elif task.kind == "tests":
            assert all((building.ROOT / target).is_file() for target in a["targets"])


SANITIZED = """========= COMPUTE-SANITIZER
first light case: channel_layer_norm  float32
first light case: feed_forward_stage  bfloat16
========= Invalid __global__ write of size 4 bytes
=========     at feed_forward_kernel+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Invalid __global__ read of size 2 bytes
{more}"""


def test_the_sanitizer_is_read_case_by_case():
    fine, bad, every = safety.read_sanitizer(SANITIZED.format(more="========= ERROR SUMMARY: 2 errors"), 17)
    assert fine == {"case": "channel_layer_norm  float32"}
    assert bad["status"] == "wrong" and bad["errors"] == 2 and "write of size 4" in bad["problem"]
    assert every["status"] == "wrong" and every["problem"].startswith("ERROR SUMMARY: 2 errors")
    *_, every = safety.read_sanitizer(SANITIZED.format(more=""), -9)
    assert every["status"] == "failed" and every["problem"].startswith("no summary")
    clean = "first light case: a\n========= ERROR SUMMARY: 0 errors\n"
    assert list(safety.read_sanitizer(clean, 0)) == [{"case": "a"}]
    assert [row.get("status") for row in safety.read_sanitizer(clean, 1)] == [None, "failed"]
    refused = "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors"
    assert [row["status"] for row in safety.read_sanitizer(refused, 1)] == ["failed"]


def test_the_sanitizer_is_called_and_its_absence_told(monkeypatch, tmp_path):
    monkeypatch.setattr(truth, "missing", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = {"names": ["channel_layer_norm"], "dtypes": ["float32"], "device": "cpu"}
    (row,) = safety.sanitizer(**arguments)
    assert row == {"status": "left out", "problem": "there is no compute-sanitizer"}
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "first light case: $*"\necho "========= ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    (row,) = safety.sanitizer(**arguments)
    assert "--tool memcheck --error-exitcode 17" in row["case"] and "tools.first_light.safety" in row["case"]


def test_reports_of_tests_are_rows():
    xml = """<testsuites><testsuite><testcase classname="tests.kernels.test_a" name="test_b[1]"/>
    <testcase classname="t" name="c"><failure message="assert 1 == 2"/></testcase>
    <testcase classname="t" name="d"><skipped message="needs a GPU"/></testcase></testsuite></testsuites>"""
    fine, wrong, skipped = safety.read_tests(xml)
    assert fine == {"case": "test_a test_b[1]"}
    assert wrong["status"] == "wrong" and wrong["problem"] == "assert 1 == 2"
    assert skipped["status"] == "left out"


def test_numbers_that_are_wrong_are_told():
    assert truth.missing("torch") is None
    case = truth.case_of("mixer_stage", "training")
    assert case.mode == "training"
    nan = torch.tensor([float("nan")])
    assert not truth.same_bits(nan, nan) and truth.same_bits(nan + 1 > 0, nan + 1 > 0)


def test_a_library_of_elsewhere_is_put_beside_the_sources(tmp_path):
    library = tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}"
    with pytest.raises(FileNotFoundError, match="library: expected a file"):
        building.place(library, tmp_path / "site")
    library.write_bytes(b"12345")
    row = building.place(library, tmp_path / "site")
    assert row["libraries"][library.name] == 5
    assert (tmp_path / "site" / "mirage" / "__init__.py").is_file()
    other = tmp_path / "_cuda.cpython-39-x86_64-linux-gnu.so"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="library: expected _cuda.*, as this Python imports it, got _cuda.cpython-39"):
        building.place(other, tmp_path / "site")


def test_architectures_are_those_of_the_build():
    assert building.architecture_of("9.0") == "90a-real" and building.architecture_of("8.0") == "80-real"
    chooser = (building.ROOT / "cmake" / "cuda.cmake").read_text()
    assert "number EQUAL 90)\n      list(APPEND architectures 90a-real)" in chooser
    assert "list(APPEND architectures ${number}-real)" in chooser


@pytest.fixture
def commands(monkeypatch):
    """What a build runs, which fails or hangs as its list says."""
    run = []
    outcomes = []

    class Process:
        pid = 0

        def __init__(self, command, stdout, **options):
            run.append((command, options["env"]))
            stdout.write(b"error: no such thing")
            stdout.flush()

        def poll(self):
            return None if outcomes else 0

        def wait(self, timeout=None):
            outcome = outcomes.pop(0)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

    monkeypatch.setattr(building.subprocess, "Popen", Process)
    monkeypatch.setattr(building.os, "killpg", lambda *arguments: None)
    monkeypatch.setattr(building, "ENDING", 0.0)
    return run, outcomes


def build(tmp_path, seconds=60.0):
    found = building.Build(tmp_path / "site", tmp_path / "cmake", tmp_path / "build.log", "9.0", seconds)
    found.start()
    return found.outcome()


def test_the_library_is_built_by_pip_for_the_gpu(commands, tmp_path):
    run, outcomes = commands
    outcomes += [0]
    assert build(tmp_path)["how"] == "pip"
    ((command, environment),) = run
    assert "--no-build-isolation" in command and "--no-deps" in command and environment["MIRAGE_CUDA"] == "on"
    assert environment["CMAKE_ARGS"] == "-DMIRAGE_CUDA_ARCHITECTURES=90a-real"


def test_where_pip_fails_cmake_builds_the_library_alone(commands, tmp_path):
    run, outcomes = commands
    outcomes += [1, 0, 0]
    (tmp_path / "cmake").mkdir()
    name = f"_cuda{EXTENSION_SUFFIXES[0]}"
    (tmp_path / "cmake" / name).write_bytes(b"123")
    row = build(tmp_path)
    assert row["status"] == "ok" and row["libraries"][name] == 3 and row["how"].startswith("cmake")
    assert [command[0] for command, _ in run][1:] == ["cmake", "cmake"]


def test_what_fails_or_hangs_is_told(commands, tmp_path):
    _, outcomes = commands
    outcomes += [1, 1]
    row = build(tmp_path)
    assert row["status"] == "failed" and "no such thing" in row["problem"]
    outcomes += [building.subprocess.TimeoutExpired("pip", 60), 0]
    row = build(tmp_path)
    assert row["status"] == "timed out" and row["problem"].startswith("not built after 60 s")


def test_what_a_gpu_says_of_itself(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(speed, "said_by", lambda *command: "Cuda compilation tools, release 13.0, V13.0.88")
    (row,) = speed.machine("cuda")
    assert row["facts"]["device"] == "NVIDIA H200" and row["facts"]["capability"] == "9.0"
    assert row["facts"]["nvcc"] == "13.0" and row["facts"]["memory_mib"] == 2**17


def test_stages_are_replayed_as_graphs_where_they_can_be(monkeypatch):
    calls = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: calls.append("replay"))
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: graph,
        "graph": lambda graph: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay, how = speed.replayed(lambda: calls.append("call"), "cuda")
    replay()
    assert how == "graph" and calls == ["call"] * 4 + ["replay"]

    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    call, how = speed.replayed(lambda: "called", "cuda")
    assert call() == "called" and how.startswith("called: no graph of it, operation not permitted")


def rows():
    kernel = {"kind": "operator", "part": "truth in Triton", "name": "a", "mode": "", "implementation": "triton"}
    time = {"median": 2e-3, "q1": 2e-3, "q3": 2e-3, "rounds": 5}
    network = {"kind": "inference", "part": "inference", "test": "test_inference", "group": "g", **time}
    half = {"kind": "stage", "part": "stages", "test": "test_stage", "group": "h", "bytes": int(4e9), **time}
    return [
        {**kernel, "dtype": "float32", "status": "ok", "error": 1e-7, "allowed": 2e-7},
        {**kernel, "dtype": "float32", "status": "ok", "error": 1.5e-7, "allowed": 2e-7, "declined": {"forward": "x"}},
        {**kernel, "dtype": "float16", "status": "wrong", "error": float("nan"), "allowed": 1e-3, "problem": "NaN"},
        {**kernel, "dtype": "bfloat16", "status": "crashed", "problem": "SIGABRT: " + "x" * 500},
        {**network, "peer": "eager", "status": "ok", "error": 0.0, "peak_mib": 10.0},
        {**network, "peer": "fast", "status": "ok", "error": 1e-6, "peak_mib": 5.0, "median": 1e-3},
        {**half, "peer": "eager", "status": "ok"},
        {**half, "peer": "fast", "status": "ok", "median": 1.25e-3},
        {"kind": "memory", "part": "t", "status": "ok", "variant": "T", "implementation": "fast", "memory_mib": 99.6},
        {"kind": "tests", "part": "safety", "status": "left out", "problem": "no tool"},
        {"kind": "inference", "part": "torch.compile", "status": "not reached", "problem": "over"},
    ]


def test_the_report_tells_what_is_right_and_what_is_not():
    facts = {"device": "NVIDIA H200", "date": "2026-11-29", "commit": "abc", "copy_bytes_per_s": 4e12}
    text = report.text(facts, rows())
    assert "| a | triton | 1.5e-07 / 2.0e-07* | nan / 1.0e-03, 1 of 1 NOT RIGHT | 1 of 1 NOT RIGHT |" in text
    assert "| g | fast | 1.00 | 2.00 to 2.00 | 2.00x | 5 | 1.0e-06 |" in text
    assert "| h | 2.00 (50%) | 1.25 (80%) | - |" in text
    assert "| MIRAGE-T | fast | 100 |" in text
    assert "- crashed: operator a triton bfloat16: SIGABRT: xxx" in text and "x" * 200 not in text
    assert "- 1 left out: no tool" in text and "- 1 of torch.compile not reached" in text
    assert "benchmarks/results/nvidia-h200-2026-11-29.json" in text


def test_the_results_file_is_json_whatever_the_numbers(tmp_path):
    report.write(tmp_path / "results.json", {"device": "d"}, rows(), finished=False)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert data["rows"][2]["error"] == "nan" and data["finished"] is False and len(data["rows"]) == 11
