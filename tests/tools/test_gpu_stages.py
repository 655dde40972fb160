"""tools/gpu_stages.py: launches as the library's host code makes them, products as its kernels execute them."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import mirage_kernels

pytest.importorskip("triton")
if torch.cuda.is_available() or mirage_kernels.available()["cuda"] != "yes":
    pytest.skip("counts in the emulation", allow_module_level=True)

TOOLS = Path(__file__).resolve().parents[2] / "tools"
OPTIONS, BACKWARD = Namespace(bandwidth=4.3, backward=False), Namespace(bandwidth=4.3, backward=True)


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("gpu_stages", TOOLS / "gpu_stages.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_stages"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype, rows, padded", [(torch.float16, 8, 192), (torch.float32, 4, 128)])
def test_products_of_the_feed_forward(tool, dtype, rows, padded):
    """96 channels: 12 chunks of 32 rows of project_in for a tile with the line around it, padded, and of 16 columns of
    project_out for the tile."""
    tile = 12 * (2 * 32 * 96 * padded + 2 * 96 * 16 * 16 * rows)
    assert tool.products("ffn", (96, 1, 20, 33), dtype) == tile * 3 * (-(-20 // rows))


def test_products_of_the_mixer_grow_with_its_tiles(tool):
    once = tool.products("mixer", (24, 1, 8, 16), torch.bfloat16)
    assert once > 0 and tool.products("mixer", (24, 1, 17, 16), torch.bfloat16) == 3 * once


@pytest.mark.parametrize("name", ["mixer", "ffn"])
def test_launches_are_those_that_run(tool, name):
    """Also those that are only recorded: nothing is computed then, at sizes that would take hours."""
    half = tool.make_half(name, (12, 2, 9, 20), training=False)
    x = torch.randn(1, 12, 9, 20)
    executed, workspace = tool.recorded(half, x, execute=True)
    dry, same = tool.recorded(half, x, execute=False)
    assert workspace == same and [launch.kernel for launch in executed] == [launch.kernel for launch in dry]
    assert [launch.blocks for launch in executed] == [launch.blocks for launch in dry]
    assert all(launch.flop == 0 for launch in dry)
    large, _ = tool.recorded(half, torch.empty(1, 12, 2160, 3840), execute=False)
    assert max(launch.blocks for launch in large) >= tool.MULTIPROCESSORS
    assert _value(half, x).isfinite().all()  # launches execute again


def _value(half, x):
    with mirage_kernels.use("cuda"), torch.inference_mode():
        return half.fast(x)


def test_bytes_of_the_feed_forward(tool):
    """x and y once, weights, and these once more as the kernel wants them, written and read; where an image has few
    tiles also sums of parts, written and read, and x a second time."""
    unit, weights = 24 * 2 * 512 * 512, 2 * (2 * 24 + 96 * 24 + 9 * 96 + 24 * 48)
    chunk = 2 * (32 * 32 + 32 * 16) + 4 * 32 * 12  # of 16 pairs of channels: matrices of 24 channels as of 32, and taps
    packed = 2 * (3 * chunk + 4 * 2 * 32)
    large = tool.cuda("ffn", (24, 1, 512, 512), torch.bfloat16, OPTIONS, [])
    assert (large["cuda_launches"], large["cuda_bytes"]) == (2, 2 * unit + weights + packed)
    assert large["cuda_issue_us"] is None
    small = tool.cuda("ffn", (24, 1, 16, 32), torch.bfloat16, OPTIONS, [])
    unit, splits = 24 * 2 * 16 * 32, 3  # one for each chunk: there are multiprocessors enough
    assert small["cuda_launches"] == 3
    assert small["cuda_bytes"] == 3 * unit + weights + packed + splits * 2 * 2 * unit  # of float


@pytest.mark.parametrize("backward", [False, True])
def test_a_pass_that_has_no_kernel(tool, backward):
    """float32 of 192 channels, of which the feed-forward has a kernel for forward only."""
    options = BACKWARD if backward else OPTIONS
    assert (tool.cuda("ffn", (192, 8, 8, 16), torch.float32, options, [])["cuda_launches"] is None) == backward


def test_bytes_of_the_mixer_backward(tool):
    """x four times, once of them by thirds, the gradient of y twice, and that of x; scratch memory has seven maps of a
    third of the channels and two floats a pixel, beside what does not grow with the image."""
    sizes = []
    for rows in (256, 512):
        row = tool.cuda("mixer", (24, 1, rows, 512), torch.bfloat16, BACKWARD, [])
        assert row["cuda_launches"] == 10
        sizes.append(row["cuda_bytes"])
    unit = 24 * 2 * 256 * 512
    assert sizes[1] - sizes[0] == 7 * unit + 2 * (7 * unit // 3 + 2 * 4 * 256 * 512)


def test_the_other_tool_is_asked_for_the_same_stages(tool, monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command[1:])
        return Namespace(stdout=json.dumps([{"us": 1.5}, {"us": 2.5}]))

    monkeypatch.setattr(tool.subprocess, "run", run)
    line = "--backward --half ffn --variant small --size 64x72 8x8 --dtype float16 --tf32"
    given = tool.parser_of("").parse_args(line.split())
    assert tool.triton_issued(given) == [1.5, 2.5]
    (script, *words), last = asked[0][:-1], asked[0][-1]
    assert script.is_file() and script.name == "triton_instructions.py" and last == "--json"
    assert tool.parser_of("").parse_args(words) == given


def compiled(tool, name, loop, every=0, arch="sm_90a"):
    instructions = {tool.cuda_resources.LOOP: loop, tool.cuda_resources.ALL: every}
    return tool.cuda_resources.Row(name, tool.cuda_resources.Code(arch, "", 1, 0, 0, 0, instructions), 256, 0)


def test_instructions_of_the_feed_forward(tool):
    """Of the kernel that takes 64 channels: at 8 lines a tile, 8 chunks, 4 instructions a cycle."""
    rows = [
        compiled(tool, f"feed_forward_kernel<TensorCores16<f16>, {blocks}, 8>", loop)
        for blocks, loop in ((2, 500), (4, 1000), (6, 3000))
    ]
    found = tool.issue_microseconds("ffn", (64, 1, 16, 32), torch.float16, rows)
    assert found == pytest.approx(4 * 8 * 1000 * 8 / (132 * 4 * 1755))
    assert tool.issue_microseconds("ffn", (64, 1, 16, 32), torch.bfloat16, rows) is None
    assert tool.issue_microseconds("ffn", (64, 1, 16, 32), torch.float16, rows, backward=True) is None


def test_instructions_of_the_mixer(tool):
    """The loop over tiles of one kernel and all of the other; of two sizes of tiles the larger, on this GPU."""
    half = "TensorCores16<f16>"
    rows = [
        compiled(tool, f"mixer_reduce_kernel<{half}, float, 2, 8>", 9000),
        compiled(tool, f"mixer_reduce_kernel<{half}, f16, 2, 8>", 1000),
        compiled(tool, f"mixer_fuse_kernel<{half}, 2, 8>", 200, 3000),
        compiled(tool, f"mixer_fuse_kernel<{half}, 2, 8>", 200, 9000, "sm_80"),
        *(compiled(tool, f"mixer_{part}_backward_kernel<{half}, 4, 4>", 9000) for part in ("fusion", "gate")),
        *(compiled(tool, f"mixer_{part}_backward_kernel<{half}, 4, 8>", 2000) for part in ("fusion", "gate")),
        *(compiled(tool, f"mixer_{part}_backward_kernel<{half}, 4, 8>", 500) for part in ("detail", "query")),
    ]
    tile = 8 / (132 * 4 * 1755)  # us of an instruction of its eight warps
    found = tool.issue_microseconds("mixer", (96, 4, 16, 32), torch.float16, rows)
    assert found == pytest.approx(4 * 4000 * tile)
    found = tool.issue_microseconds("mixer", (192, 8, 16, 32), torch.float16, rows, backward=True)
    assert found == pytest.approx(4 * 5000 * tile)
    assert tool.issue_microseconds("mixer", (240, 8, 16, 32), torch.float16, rows) is None


@pytest.mark.parametrize("more", [[], ["--backward", "--half", "mixer"]], ids=str)
def test_table_and_json(tool, monkeypatch, capsys, more):
    monkeypatch.setattr(tool, "resources", list)
    monkeypatch.setattr(tool, "triton_issued", lambda options: [1e6] + [0.0] * (len(list(tool.stages(options))) - 1))
    if more:  # one half of two kinds: to count the products of Triton's backward takes minutes
        kinds = tool.stages.__globals__["block_kinds"]("tiny", 64, 64)[:2]
        monkeypatch.setitem(tool.stages.__globals__, "block_kinds", lambda *arguments: kinds)
    arguments = ["--size", "64x64", "--dtype", "float16", *more]
    assert tool.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in found] == (["mixer", "mixer"] if more else ["mixer", "ffn"] * 5)
    assert found[0]["triton_us"] == found[0]["triton_issue_us"] == 1e6 > found[1]["triton_us"]
    for row in found:
        assert row["floor_bytes"] <= min(row["cuda_bytes"], row["triton_bytes"])
        assert row["triton_bytes"] <= row["eager_bytes"]
        assert row["floor_us"] <= row["cuda_us"] and row["cuda_launches"] < row["eager_launches"]
    assert tool.main(arguments) == 0
    assert "| mixer 24x64x64 | float16 |" in capsys.readouterr().out
