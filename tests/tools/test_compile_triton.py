"""tools/compile_triton.py: what it reports for an operator, and that it finds kernels that spill or break."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "compile_triton.py"


def _run(cache: Path, *arguments: object) -> list[dict]:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(cache))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_spills_and_errors_are_problems(target, tmp_path):
    rows = _run(tmp_path, Path(__file__).with_name("outer_product.py"), SCRIPT, target)
    small, large, broken = rows  # the second launch is the first again
    assert small["problem"] == "" and small["spills"] == 0 and 0 < small["registers"] < 128
    assert (small["warps"], small["blocks"], small["kernel"]) == (4, 7, "outer_product")
    assert large["spills"] > 0 and "spills" in large["problem"]
    assert broken["registers"] == 0 and "asked to break" in broken["problem"]


def test_command_lists_each_kernel_of_an_operator(tmp_path):
    rows = _run(tmp_path, SCRIPT, "--target", "sm_90", "--operator", "channel_layer_norm", "--json")
    assert {row["kernel"] for row in rows} == {"_forward_kernel", "_backward_kernel"}
    assert all(row["registers"] > 0 and row["spills"] == 0 and row["problem"] == "" for row in rows)
    assert {row["case"].split()[0] for row in rows} == {"float32", "float16", "bfloat16"}
    assert any("int64" in row["case"] for row in rows)
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)


def test_disassembly(tmp_path):
    """Products of float32 are tensor-core instructions where TF32 is allowed, and only there; planes are read 16 bytes
    at a time."""
    rows = _run(tmp_path, SCRIPT, "--target", "sm_90", "--operator", "spd_covariance", "--sass", "--json")
    moments = [row for row in rows if row["kernel"] == "_moments_kernel" and row["case"].startswith("float32 C=24")]
    assert {row["tensor_cores"] > 0 for row in moments} == {True, False}
    assert all(sum(row["loads"].values()) > 0 and set(row["loads"]) <= {"1", "2", "4", "8", "16"} for row in rows)
    assert any("16" in row["loads"] for row in rows)


def test_a_problem_makes_the_exit_status_1(tmp_path):
    """Asked of Python, as no shipped operator has a problem: an operator whose cases raise."""
    code = (
        f"import sys; sys.argv = ['compile_triton.py', '--target', 'sm_80', '--jobs', '1', '--json']\n"
        f"import runpy; tool = runpy.run_path({str(SCRIPT)!r})\n"
        "tool['main'].__globals__['operators'] = lambda: ['absent']\n"
        "print(tool['main']())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ModuleNotFoundError" in done.stdout and done.stdout.rstrip().endswith("1")
