"""tools/triton_instructions.py: the launches of a stage, and what their instructions take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Of the tool, told of the first stages alone, in a process in which Triton's kernels are not interpreted."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))

    code = (
        "import sys, itertools, triton_instructions as tool; count = int(sys.argv.pop(1)); every = tool.stages\n"
        "tool.stages = lambda options: itertools.islice(every(options), count)\n"
        "sys.exit(tool.main())"
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOLS), environment.get("PYTHONPATH", "")])

    def run(stages: int, *arguments: str) -> str:
        command = [sys.executable, "-c", code, str(stages), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_stages_of_a_block(output):
    found = json.loads(output(2, "--size", "128x128", "--dtype", "float16", "--json"))
    assert [row["stage"] for row in found] == ["mixer", "ffn"]
    assert found[0]["shape"] == [1, 24, 128, 128] and found[0]["dtype"] == "float16"
    names = [[kernel["kernel"] for kernel in row["kernels"]] for row in found]
    assert names[0] == ["prepare_kernel", "gram_kernel", "statistics_kernel", "finish_kernel"]
    assert names[1] == ["_expand_kernel", "_contract_kernel"]
    for row in found:
        assert row["us"] == pytest.approx(sum(kernel["us"] for kernel in row["kernels"]))
        for kernel in row["kernels"]:
            issued = kernel["programs"] * kernel["warps"] * kernel["instructions"]
            assert kernel["us"] == pytest.approx(issued / (132 * 4 * 1755))
            assert kernel["instructions"] > kernel["tensor_cores"] and 0 < kernel["registers"] <= 255
    assert all(kernel["tensor_cores"] > 0 for kernel in found[0]["kernels"] if kernel["kernel"] != "statistics_kernel")


def test_backward_is_without_forward(output):
    text = output(1, "--size", "64x64", "--dtype", "bfloat16", "--half", "mixer", "--backward")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    own = [row for row in rows if row[0] == "mixer 24x64x64"]
    launched = [row[2] for row in own]
    assert "finish_kernel" not in launched and len(launched) > 10 and launched[-1] == "**all**"
    assert float(own[-1][-1]) == pytest.approx(sum(float(row[-1]) for row in own[:-1]), abs=0.05 * len(own))
