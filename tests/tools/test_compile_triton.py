"""tools/compile_triton.py: what it reports for an operator, and that it finds kernels that spill or break."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
MODULE = "import sys; from tools.compile_triton import main; sys.exit(main())"
CASES = ("--target", "sm_90", "--operator", "spd_covariance", "--case", "C=24")


def _environment(cache: Path) -> dict[str, str]:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(cache))
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return environment


@pytest.fixture
def output(fresh, tmp_path):
    """What a program prints in a process of its own, as the tool turns Triton's interpreter off."""

    def run(code: str, *arguments: object, cache: Path = tmp_path) -> str:
        done = fresh.run(code, *arguments, environment=_environment(cache))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def found(output):
    return lambda *arguments: json.loads(output(*arguments))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def rows(cache):
    """Of the command, with its own processes: every binary of some cases of an operator, disassembled."""
    command = [sys.executable, "-m", "tools.compile_triton", *CASES, "--sass", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(cache), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_spills_and_errors_are_problems(target, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("outer_product.py")), target]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(tmp_path), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    small, large, broken = json.loads(done.stdout)  # the second launch is the first again
    assert small["problem"] == "" and small["spills"] == 0 and 0 < small["registers"] < 128
    assert (small["warps"], small["blocks"], small["kernel"]) == (4, 7, "outer_product")
    assert large["spills"] > 0 and "spills" in large["problem"]
    assert broken["registers"] == 0 and "asked to break" in broken["problem"]


def test_registers_traded_for_a_program(found):
    cases = (  # target, registers, spilled bytes, warps, and whether that makes room for a program
        ("sm_90", 64, 8, 8, True),  # four of them; with 66 registers, which are 72, three
        ("sm_80", 128, 16, 4, True),
        ("sm_90", 60, 8, 8, False),  # 62 are 64: as many programs
        ("sm_90", 128, 20, 4, False),  # more than the compiler gives up for that
        ("sm_90", 255, 8, 8, False),  # one program, either way
        ("gfx942", 64, 8, 8, False),
        ("sm_90", 64, 0, 8, False),
    )
    code = (
        "import json, sys; from tools.compile_triton import Row\n"
        "rows = [Row(*case[:1], '', '', '', *case[1:3], warps=case[3]) for case in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[row.traded, row.problem] for row in rows]))"
    )
    for (*_, spills, _, traded), row in zip(cases, found(code, json.dumps(cases)), strict=True):
        assert row == [traded, "" if traded or not spills else f"spills {spills} bytes per thread"]


def test_command_lists_each_kernel_of_an_operator(rows, cache, output):
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    assert set(kernels) == {"_moments_kernel", "_merge_kernel", "_backward_kernel"}
    assert all(row["registers"] > 0 and row["spills"] == 0 and row["problem"] == "" for row in rows)
    assert {row["case"].split()[0] for row in rows} == {"float32", "float16", "bfloat16"}
    assert any("int64" in row["case"] for row in rows) and all("C=24" in row["case"].split() for row in rows)
    assert len({json.dumps(row) for row in rows}) == len(rows)
    text = output(MODULE, *CASES, "--jobs", "1", "--summary", cache=cache)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["operator", "kernel", "binaries", "sm_90: registers", "spilled B", "shared KiB"]
    for name, line in zip(kernels, table[2:], strict=True):
        own = [row for row in rows if row["kernel"] == name]
        most = [max(row[key] for row in own) for key in ("registers", "spills", "shared")]
        assert line == ["spd_covariance", name, str(len(own)), *map(str, most[:2]), f"{most[2] / 1024:.1f}"]


def test_every_operator_launches_its_kernels(found):
    """Nothing is compiled here. Offsets are of 64 bit where the case says so, and only there."""
    code = (
        "import json, torch; from mirage_kernels._runtime import cases\n"
        "from tools.compile_triton import Operators, launching, operators, variants\n"
        "found = {}\n"
        "def hook(kernel, programs, args, options):\n"
        "    found[label].setdefault(kernel.__name__, []).append(options.get('INT64'))\n"
        "with launching(hook), Operators():\n"
        "    for operator in cases.operators(operators()):\n"
        "        for label, tensors in variants(operator):\n"
        "            label = f'{operator.name}: {label}'; assert label not in found; found[label] = {}\n"
        "            y = operator.public(*(t.requires_grad_() for t in tensors))\n"
        "            torch.autograd.grad(y, tensors, torch.empty_like(y))\n"
        "print(json.dumps(found))"
    )
    launched = found(code)
    assert set(launched["channel_layer_norm: float32 C=24 224x224"]) == {"_forward_kernel", "_backward_kernel"}
    assert set(launched["feed_forward_stage: bfloat16 C=48 112x112"]) == {
        *("_expand_kernel", "_contract_kernel"),
        *("gate_gradient_kernel", "hidden_gradient_kernel", "norm_gradient_kernel"),
    }
    trained = launched["mixer_stage: float32 C=48 112x112 2 training"]
    assert {"prepare_kernel", "finish_kernel", "batch_norm_kernel", "input_gradient_kernel"} <= set(trained)
    assert len({label.split(":")[0] for label in launched}) == 9 and all(launched.values())
    wide = {label: any(any(given) for given in kernels.values()) for label, kernels in launched.items()}
    assert {label for label, is_wide in wide.items() if is_wide} == {label for label in launched if "int64" in label}


@pytest.mark.parametrize("default, environment", [(True, ""), (False, ""), (True, "0")])  # until 3.9, from 3.10
def test_multiply_adds_are_fused_whatever_triton_does_by_default(default, environment, found, monkeypatch):
    """Unless the user's environment says otherwise."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", environment)
    if not environment:
        monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")
    code = (
        "import json, re, torch; from tools import compile_triton as tool\n"
        "import triton; from mirage_kernels import channel_layer_norm\n"
        f"if {not environment}: triton.knobs.language.default_fp_fusion = {default}\n"
        "driver, found = tool.AbsentDriver('sm_90'), []\n"
        "def hook(*call): found.append(driver.compile(*call).asm['ptx'])\n"
        "x = torch.empty(1, 24, 8, 8, device='meta')\n"
        "with tool.launching(hook), tool.Operators(): channel_layer_norm(x, x[0, :, 0, 0], x[0, :, 0, 0])\n"
        "print(json.dumps([len(re.findall(r'\\bfma\\.rn(?:\\.ftz)?\\.f32', ptx)) for ptx in found]))"
    )
    (fused,) = found(code)
    assert (fused > 0) == (environment != "0")


def test_disassembly(rows):
    """Products of float32 are tensor-core instructions where TF32 is allowed, and only there; planes are read 16 bytes
    at a time."""
    moments = [row for row in rows if row["kernel"] == "_moments_kernel" and row["case"].startswith("float32 C=24")]
    assert {row["tensor_cores"] > 0 for row in moments} == {True, False}
    assert all(sum(row["loads"].values()) > 0 and set(row["loads"]) <= {"1", "2", "4", "8", "16"} for row in rows)
    assert any("16" in row["loads"] for row in rows)


def test_summary(found):
    """The most of a target's binaries, and what was disassembled of sm_90's; a launch that did not compile is none."""
    code = (
        "import json; from tools.compile_triton import Row, summary\n"
        "rows = [Row('sm_80', 'a', 'k', '', 40, 8, 512),"
        " Row('sm_90', 'a', 'k', '', 50, 0, 2048, 4, 1, 3, {2: 1, 16: 5}),"
        " Row('sm_90', 'a', 'k', '', 30, 4, 0, 4, 1, 0, {2: 7}), Row('sm_90', 'a', 'k', '', error='no'),"
        " Row('sm_80', 'b', 'k', '', 20)]\n"
        "print(json.dumps([summary(some, ['sm_80', 'sm_90']) for some in (rows, rows[:1])]))"
    )
    both, alone = found(code)
    assert both == [
        ["a", "k", 3, 40, 8, "0.5", 50, 4, "2.0", "1 of 2", "2:8 16:5"],
        ["b", "k", 1, 20, 0, "0.0", "-", "-", "-", "0 of 0", ""],
    ]
    assert alone == [["a", "k", 1, 40, 8, "0.5", "-", "-", "-"]]


def test_a_problem_makes_the_exit_status_1(output):
    """Asked of Python, as no shipped operator has a problem: an operator that is not there."""
    code = (
        "import sys; from tools import compile_triton as tool; tool.operators = lambda: ['absent']\n"
        "print(tool.main(['--target', 'sm_80', '--jobs', '1', '--json']))"
    )
    text = output(code)
    assert "no operator 'absent'" in text and text.rstrip().endswith("1")
