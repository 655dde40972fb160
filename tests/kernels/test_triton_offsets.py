"""Offsets past 32 bits in Triton: channels 2^30 elements apart. Each stride fits 32 bits, its multiples do not.

The memory in between is never touched, so that it costs addresses only; on a GPU it is real, up to 8 GiB.
"""

import pytest
import torch
from harness import ON_GPU, device_of, evaluate, random_like, require

import mirage_kernels
from mirage_kernels._runtime.cases import operators

pytestmark = [pytest.mark.gpu] if ON_GPU else []
APART = 2**30


def far(t):
    """The values of t [1, C, H, W], its channels far apart."""
    _, channels, height, width = t.shape
    memory = torch.empty(APART * (channels - 1) + height * width, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, (APART * channels, APART, width, 1)).copy_(t)


OPERATORS = [op for op in operators() if "triton" in op.implementations and not op.is_stage]


def few_channels(operator):
    """Of its shapes of one sample and some pixels, the one with the fewest channels of which the last is far."""
    single = [shape for shape in operator.shapes if shape[0] == 1 and shape[1] >= 3 and 10 < shape[2] * shape[3] < 100]
    return min(single, key=lambda shape: shape[1])


@pytest.mark.parametrize("far_gradient", [False, True])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_channels_far_apart(operator, far_gradient):
    """Bit for bit the results of the same values without gaps: every second map, or the gradient of the output."""
    require("triton")
    inputs = operator.inputs(few_channels(operator), torch.float16, device_of("triton"))
    maps = [i for i, t in enumerate(inputs) if t.shape == inputs[0].shape]
    with mirage_kernels.use("triton"):
        grad_output = random_like(operator.public(*inputs))
        expected = evaluate(operator.public, inputs, grad_output)
        spread = [t.detach() for t in inputs]
        if not far_gradient:
            for i in maps[::2]:
                spread[i] = far(spread[i])
        elif grad_output.dim() == 4:
            grad_output = far(grad_output)
        results = evaluate(operator.public, [t.requires_grad_() for t in spread], grad_output)
    for value, peer in zip(results, expected, strict=True):
        assert torch.equal(value, peer)
