"""Scratch memory kept between calls by the C++ kernels: bounded, and given back on request."""

import pytest
import torch

import mirage.fast
import mirage_kernels

LIMIT = 64 << 20
needs_cpp = pytest.mark.skipif(mirage_kernels.available()["cpp"] != "yes", reason="the C++ library is not there")


@needs_cpp
def test_a_step_keeps_a_bounded_workspace():
    torch.manual_seed(0)
    model = mirage.fast.mirage_tiny().train()
    mirage_kernels.release_workspace()
    model(torch.rand(1, 3, 48, 48)).square().mean().backward()
    assert 0 < mirage_kernels.release_workspace() <= LIMIT
    assert mirage_kernels.release_workspace() == 0


@needs_cpp
def test_results_do_not_depend_on_what_the_workspace_held():
    torch.manual_seed(1)
    weights = [torch.randn(s) for s in ((24,), (24,), (96, 24, 1, 1), (96, 1, 3, 3), (24, 48, 1, 1))]
    x = torch.randn(1, 24, 40, 56, requires_grad=True)
    results = []
    for poison in (0.0, float("nan"), 1e30):
        mirage_kernels.release_workspace()
        # Runs of the same kernels on values of that kind leave them in the buffers that the next run takes.
        with torch.no_grad():
            mirage_kernels.feed_forward_stage(torch.full((1, 24, 40, 56), poison), *weights)
        filled = torch.full((1, 24, 40, 56), poison, requires_grad=True)
        mirage_kernels.feed_forward_stage(filled, *weights).sum().backward()
        y = mirage_kernels.feed_forward_stage(x, *weights)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
