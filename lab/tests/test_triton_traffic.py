"""lab/triton_traffic.py: what it counts, on the meta device."""

import json
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")



@pytest.fixture(scope="module")
def tool():
    return import_module("lab.triton_traffic")


def test_operations_are_counted_by_their_tensors(tool):
    """Views and allocations move nothing; a convolution reads image and weight and writes its result."""
    x = torch.empty(1, 3, 8, 10, device="meta")
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False).to("meta")
    traffic = tool.measure(tool.restore(lambda x: conv(x).view(5, 8, 10).transpose(0, 1), x))
    assert (traffic.launches, traffic.triton) == (1, 0)
    assert traffic.bytes == 4 * (x.numel() + conv.weight.numel() + 5 * 80)


def test_a_block_is_counted_by_its_kernels(tool):
    """In units of x: the mixer reads it twice and writes it once, writes 4/3 and reads 2/3 and 4/3 of it; the
    feed-forward reads it twice, writes it once, and writes and reads 4. Weights come on top."""
    block = tool.mirage.blocks.TransformerBlock(24, 1).eval().to("meta", torch.float16)
    model = tool.mirage.fast.accelerate(torch.nn.Sequential(block))
    x = torch.empty(1, 24, 512, 512, dtype=torch.float16, device="meta")
    traffic = tool.measure(tool.restore(model, x))
    assert (traffic.launches, traffic.triton) == (7, 6)  # of so many parts the sum is PyTorch's
    small = tool.measure(tool.restore(model, torch.empty(1, 24, 128, 128, dtype=torch.float16, device="meta")))
    assert (small.launches, small.triton) == (6, 6)
    units = traffic.bytes / (x.numel() * x.element_size())
    # qkv is counted whole where q and k, or v, are read of it
    assert 2 + 1 + 4 / 3 + 1 + 4 / 3 + 11 <= units < 2 + 1 + 4 / 3 + 1 + 4 / 3 + 11 + 0.5


def test_a_step_is_counted_with_its_gradients(tool):
    """The composites moved more than 140 units of x in a step of a block, and kept 23 at its peak."""
    block = tool.mirage.blocks.TransformerBlock(24, 1).train().to("meta", torch.float16)
    model = tool.mirage.fast.accelerate(torch.nn.Sequential(block))
    x = torch.empty(8, 24, 128, 128, dtype=torch.float16, device="meta", requires_grad=True)

    def step():
        y = model(x)
        torch.autograd.grad(y, [x, *model.parameters()], torch.empty_like(y))

    traffic, unit = tool.measure(step), x.numel() * x.element_size()
    assert traffic.triton > 20 and 60 < traffic.bytes / unit < 100
    assert 3 <= traffic.peak / unit < 14  # x, its gradient, and what the mixer's backward holds


def test_memory_is_what_is_alive(tool):
    """A result that is not kept is not counted with the next."""
    x = torch.empty(1000, device="meta")

    def call():
        for _ in range(3):
            x + 1
        return x * 2 + 3

    assert tool.measure(call).peak == 3 * 4000


def test_table_and_json(tool, capsys):
    assert tool.main(["--variant", "tiny", "--size", "64x64", "--dtype", "float16", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["shape"] == [1, 3, 64, 64] and row["fast_launches"] < row["eager_launches"]
    assert row["eager_triton"] == 0 < row["fast_triton"]
    assert row["fast_predicted_ms"] == pytest.approx(row["fast_bytes"] / 4.3e9)
    assert tool.main(["--variant", "tiny", "--size", "64x64", "--dtype", "float16", "--bandwidth", "2"]) == 0
    assert "at 2.0 TB/s" in capsys.readouterr().out
    small = ["--variant", "tiny", "--size", "64x64", "--batch", "2", "--dtype", "bfloat16", "--step", "--json"]
    assert tool.main(small) == 0
    (step,) = json.loads(capsys.readouterr().out)
    assert step["fast_bytes"] < step["eager_bytes"] and step["fast_peak"] < step["eager_peak"]
