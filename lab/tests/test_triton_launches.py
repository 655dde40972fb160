"""lab/triton_launches.py: products counted from the kernels' code, bytes as in triton_traffic.py, and their sums."""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter")



@pytest.fixture(scope="module")
def tool():
    return import_module("lab.triton_launches")


def _block(tool, channels, heads, step=False):
    return tool.mirage.blocks.TransformerBlock(channels, heads, drop_path=0.1).train(step)


def _meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_products_of_a_kernel(tool):
    """The feed-forward's first product, C by 4C: 192 channels need no padding, 24 are multiplied as 32 by 128."""
    name, pixels = ("feed_forward_stage", "_expand_kernel"), 64 * 64
    found = tool.launches_of(_block(tool, 192, 8), _meta(1, 192, 64, 64), step=False).kernels[name]
    assert found.products == {"16 bit": 2 * 4 * 192 * 192 * pixels} and found.launches == 1
    found = tool.launches_of(_block(tool, 24, 1), _meta(1, 24, 64, 64), step=False).kernels[name]
    assert found.products == {"16 bit": 2 * 128 * 32 * pixels}
    found = tool.launches_of(_block(tool, 24, 1), _meta(3, 24, 64, 60), step=False).kernels[name]
    assert found.products == {"16 bit": 2 * 128 * 32 * 3 * 64 * 60}


@pytest.mark.parametrize(
    "dtype, step, kinds", [(torch.float16, True, {"16 bit", "tf32"}), (torch.float32, False, {"float32"})]
)
def test_all_programs_and_iterations_count(tool, dtype, step, kinds):
    """What is counted from some programs and one iteration of a loop is what all of them do on real memory: on an image
    that tiles do not fit, with parts of unequal size."""
    from triton.runtime.interpreter import InterpreterBuilder

    from mirage_kernels import use
    from mirage_kernels._triton import launch

    real, dot = {}, InterpreterBuilder.create_dot
    current = Counter()

    def counting_dot(builder, a, b, *rest):
        result = dot(builder, a, b, *rest)
        current[""] += 2 * result.data.size * a.data.shape[-1]
        return result

    def run(kernel, programs, args, options):
        current.clear()
        kernel[(programs,)](*args, **options)
        name = kernel.fn.__module__.split(".")[1], kernel.__name__
        real[name] = real.get(name, 0) + current[""]

    with mock.patch.object(tool, "FILL", 6):
        counted = tool.launches_of(_block(tool, 24, 2), _meta(1, 24, 9, 13, dtype=dtype), step).kernels
    model = tool.mirage.fast.accelerate(torch.nn.Sequential(_block(tool, 24, 2, step))).to(dtype)
    x = torch.rand(1, 24, 9, 13, dtype=dtype, requires_grad=step)
    with (
        use("triton"),
        mock.patch.object(tool.triton_tiles, "FILL", 6),
        mock.patch.object(launch, "launch_hook", run),
        mock.patch.object(InterpreterBuilder, "create_dot", counting_dot),
        torch.set_grad_enabled(step),
    ):
        y = model(x)
        if step:
            torch.autograd.grad(y, [x, *model.parameters()], torch.rand_like(y))
    ours = {name: kernel for name, kernel in counted.items() if name[0] != "PyTorch"}
    assert {name: sum(kernel.products.values()) for name, kernel in ours.items()} == real
    assert {kind for kernel in ours.values() for kind, n in kernel.products.items() if n} == kinds
    assert real["feed_forward_stage", "_contract_kernel"] > 0 == real["mixer_stage", "statistics_kernel"]


def test_products_of_pytorch_and_of_tf32(tool):
    """An image too small for the feed-forward's kernels has its products in PyTorch's convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        kernels = tool.launches_of(_block(tool, 192, 8), _meta(1, 192, 8, 8, dtype=torch.float32), step=False).kernels
    finally:
        torch.set_float32_matmul_precision(before)
    assert ("feed_forward_stage", "_expand_kernel") not in kernels
    assert kernels["PyTorch", "its operations"].products == {"tf32": 2 * 64 * (192 * 768 + 384 * 192)}
    assert set(kernels["mixer_stage", "finish_kernel"].products) == {"tf32"}


def test_bytes_and_launches_are_those_of_triton_traffic(tool):
    """Which runs in a process of its own, where nothing is interpreted: the launches are those of a GPU."""
    shape = (2, 48, 64, 64)
    code = (
        f"import torch; from lab import triton_traffic as tool\n"
        "for step in (False, True):\n"
        "    block = tool.mirage.blocks.TransformerBlock(48, 2, drop_path=0.1).train(step).to('meta', torch.float16)\n"
        f"    x = torch.empty({shape}, dtype=torch.float16, device='meta', requires_grad=step)\n"
        "    model = tool.mirage.fast.accelerate(torch.nn.Sequential(block))\n"
        "    def train():\n"
        "        y = model(x)\n"
        "        torch.autograd.grad(y, [x, *model.parameters()], torch.empty_like(y))\n"
        "    found = tool.measure(train if step else tool.restore(model, x))\n"
        "    print(found.launches, found.triton, found.bytes)\n"
        "from mirage_kernels._triton import tiles; print(tiles.FILL)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *expected, fill = done.stdout.splitlines()
    assert int(fill) == tool.FILL
    for step, line in zip((False, True), expected, strict=True):
        with mock.patch.object(tool, "products", lambda *launch: Counter()):  # which take minutes in a step
            found = tool.launches_of(_block(tool, 48, 2, step), _meta(*shape), step)
        kernels = found.kernels.values()
        assert f"{found.launches} {found.triton} {found.bytes}" == line
        assert (sum(k.launches for k in kernels), sum(k.bytes for k in kernels)) == (found.launches, found.bytes)


def test_totals_and_tables(tool, capsys):
    arguments = ["--size", "64x64", "--dtype", "float32", "--level", "level1", "latent", "--bandwidth", "2"]
    assert tool.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(level["level"], level["blocks"], level["shape"]) for level in found["levels"]] == [
        ("level1", 3, [1, 24, 64, 64]),
        ("latent", 7, [1, 192, 8, 8]),
    ]
    for level in found["levels"]:
        for row in level["kernels"]:
            assert row["us_bytes"] == pytest.approx(row["bytes"] / 2e6)
            assert row["us"] == max(row["us_bytes"], row["us_products"])
            assert row["us"] == row[f"us_{row['bound']}"]
        for key in ("launches", "programs", "bytes", "flop", "us_bytes", "us_products", "us"):
            assert level["block"][key] == sum(row[key] for row in level["kernels"])
        assert level["block"]["us_products"] == pytest.approx(level["block"]["flop"] / 67e6)
    one, seven = (level["block"] for level in found["levels"])
    assert found["network"] == {key: 3 * one[key] + 7 * seven[key] for key in one}
    assert one["floor_bytes"] == 2 * 2 * 24 * 64 * 64 * 4
    assert tool.main([*arguments[:4], "--level", "latent", "--rate", "1", "--json"]) == 0
    latent = json.loads(capsys.readouterr().out)["levels"][0]["block"]
    assert latent["us_products"] == pytest.approx(latent["flop"] / 1e6) and latent["flop"] == seven["flop"]
    assert tool.main([*arguments, "--rate", "1"]) == 0
    text = capsys.readouterr().out
    assert "at 2.0 TB/s" in text and "| latent | **a block** of 1x192x8x8, one of 7 |" in text
    assert "all blocks" not in text and len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_blocks_of_both_networks(tool):
    for variant, channels, counts in (("tiny", 24, [3, 10, 10, 7, 5]), ("small", 30, [3, 10, 10, 7, 6])):
        levels = tool.levels_of(variant)
        assert [level.count for level in levels.values()] == counts
        assert [level.channels for level in levels.values()] == [n * channels for n in (1, 2, 4, 8, 2)]
        assert [level.scale for level in levels.values()] == [1, 2, 4, 8, 1]
