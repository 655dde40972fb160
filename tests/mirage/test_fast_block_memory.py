"""mirage.fast.TransformerBlock: what it keeps for backward, and the memory argument."""

import copy
from functools import partial

import pytest
import torch
from fast_blocks import image, pair, step
from torch import nn

import mirage
import mirage.fast
from mirage.complexity import MemoryTracker


def remember(storages, tensor):
    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


@pytest.mark.parametrize(("memory", "dim", "maps"), [("low", 24, 2), ("fast", 24, 2), ("low", 96, 2), ("fast", 96, 6)])
def test_a_block_keeps_two_maps(impl, memory, dim, maps):
    """Its input and the tensor between its halves; with "fast" also the four times as wide hidden tensor, where there
    are many channels. What else is kept does not grow with the image."""
    _, block = pair(dim=dim, dtype=torch.float32)
    mirage.fast.accelerate(block, memory=memory)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    small = []
    for side in (16, 32):
        storages = {}
        x = image(dim=dim, height=side, width=side, dtype=torch.float32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, storages), lambda t: t):
            y = block(x)
        assert y.untyped_storage().data_ptr() not in storages
        kept = sum(size for storage, size in storages.items() if storage not in parameters)
        small.append(kept - maps * x.untyped_storage().nbytes())
    assert small[0] == small[1] < 1000 * dim


def test_the_tracker_sees_two_maps(impl):
    """mirage.complexity counts what is alive after a forward of two blocks: four maps and the result."""
    model = nn.Sequential(pair(dim=24, dtype=torch.float32)[1], pair(dim=24, dtype=torch.float32)[1])
    x = image(dim=24, height=48, width=48, dtype=torch.float32).requires_grad_()
    tracker = MemoryTracker()
    tracker.add([x, *model.parameters(), *model.buffers()])
    before, size = tracker.current, x.numel() * 4
    with tracker:
        y = model(x)
    assert 4 * size <= tracker.current - before < 4.2 * size  # x is in `before`
    assert y.shape == x.shape


def test_memory_is_set_switched_and_removed():
    block, _ = pair()
    attributes = set(vars(block))
    assert mirage.fast.accelerate(block, memory="fast")._mirage_memory == "fast"
    assert mirage.fast.accelerate(block)._mirage_memory == "low"
    mirage.fast.revert(block)
    assert set(vars(block)) == attributes
    for build in (mirage.fast.mirage_tiny, mirage.fast.mirage_small):
        model = build(memory="fast", num_blocks=(1, 1, 1, 1), num_refinement_blocks=1)
        assert model.latent[0]._mirage_memory == "fast"
    with pytest.raises(ValueError, match="memory: expected one of low, fast, got 'high'"):
        mirage.fast.accelerate(block, memory="high")


def test_memory_changes_no_result(impl):
    _, fast = pair(dim=96)
    x = image(dim=96)
    low = step(copy.deepcopy(fast), x)
    for value, expected in zip(step(mirage.fast.accelerate(fast, memory="fast"), x), low, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
