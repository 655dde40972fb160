"""tools/compile_triton.py: what it reports for an operator, and that it fails where a kernel spills or breaks."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "compile_triton.py"
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)


def _tool():
    specification = importlib.util.spec_from_file_location("compile_triton", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["compile_triton"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


if os.environ.get("TRITON_INTERPRET") != "1":

    @triton.jit
    def _outer_product(p_x, p_y, N: tl.constexpr, BROKEN: tl.constexpr):
        o = tl.arange(0, N)
        b_x = tl.load(p_x + o)
        b = tl.load(p_x + o[:, None] * N + o[None, :])  # N * N values, all needed until the loop ends
        for _ in range(8):
            b = b * tl.sum(b, 0)[None, :] + b_x[:, None]
        tl.static_assert(not BROKEN, "asked to break")
        tl.store(p_y + o[:, None] * N + o[None, :], b)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_spills_and_errors_are_problems(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = _tool().Compiler(target, "outer_product")
    x, y = (torch.empty(256 * 256, device="meta") for _ in range(2))
    for size, warps, broken in ((16, 4, False), (16, 4, False), (256, 4, False), (16, 4, True)):
        compiler(_outer_product, 7, (x, y), {"N": size, "BROKEN": broken, "num_warps": warps})
    small, large, broken = compiler.rows  # the second launch is the first again
    assert small.problem == "" and small.spills == 0 and 0 < small.registers < 128
    assert (small.warps, small.blocks, small.kernel) == (4, 7, "_outer_product")
    assert large.spills > 0 and "spills" in large.problem
    assert broken.registers == 0 and "asked to break" in broken.problem


def test_command_lists_each_kernel_of_an_operator(tmp_path):
    command = [sys.executable, str(SCRIPT), "--target", "sm_90", "--operator", "channel_layer_norm", "--json"]
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == {"_forward_kernel", "_backward_kernel"}
    assert all(row["registers"] > 0 and row["spills"] == 0 and row["problem"] == "" for row in rows)
    assert {row["case"].split()[0] for row in rows} == {"float32", "float16", "bfloat16"}
    assert any("int64" in row["case"] for row in rows)
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)


def test_shared_memory_beyond_the_gpu_is_a_problem():
    row = _tool().Row("gfx942", "op", "kernel", "case", registers=10, shared=64 * 1024 + 1)
    assert "shared memory" in row.problem
