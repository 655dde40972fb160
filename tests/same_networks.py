"""Two networks with the same parameters compute the same."""

import torch
from torch import Tensor, nn


def check_same(network: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Values and gradients of all parameters, and values without autograd; all in float64."""
    results = []
    for model in (network, other):
        value = model(x)
        parameters = list(model.parameters())
        results.append([value, *torch.autograd.grad(value.square().mean(), parameters, allow_unused=True)])
    for exact, found in zip(*results, strict=True):
        assert (found is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(other(x), network(x), rtol=1e-9, atol=1e-11)
