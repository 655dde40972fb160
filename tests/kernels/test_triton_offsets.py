"""Offsets past 32 bits in Triton: channels 2^30 elements apart. Each stride fits 32 bits, its multiples do not.

The memory in between is never touched, so that it costs addresses only; on a GPU it is real, up to 8 GiB.
"""

import pytest
import torch
from harness import ON_GPU, device_of, evaluate, require

import mirage_kernels

pytestmark = [pytest.mark.gpu] if ON_GPU else []
APART = 2**30


def far(t):
    """The values of t [1, C, H, W], its channels far apart."""
    _, channels, height, width = t.shape
    memory = torch.empty(APART * (channels - 1) + height * width, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, (APART * channels, APART, width, 1)).copy_(t)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float16)


OPERATORS = {
    "channel_layer_norm": (randn(1, 3, 4, 5), randn(3), randn(3)),
    "gated_depthwise_ffn": (randn(1, 4, 4, 5), randn(4, 1, 3, 3)),
    "dynamic_depthwise_conv2d": (randn(1, 3, 4, 5), randn(1, 3, 3, 3)),
    "tri_branch_fusion": (*(randn(1, 3, 4, 5) for _ in range(3)), *(randn(1) for _ in range(3))),
    "spd_covariance": (randn(1, 3, 4, 5),),
}


@pytest.mark.parametrize("far_gradient", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_channels_far_apart(name, far_gradient):
    """Bit for bit the results of the same values without gaps."""
    require("triton")
    device, operator = device_of("triton"), getattr(mirage_kernels, name)
    x, *rest = (t.to(device) for t in OPERATORS[name])
    with mirage_kernels.use("triton"):
        inputs = [t.requires_grad_() for t in (x, *rest)]
        expected = evaluate(operator, inputs)
        grad_output = torch.ones_like(expected[0])
        if expected[0].dim() == 4 and far_gradient:
            grad_output = far(grad_output[:, :3]) if expected[0].shape[1] == 3 else far(grad_output)
        expected = evaluate(operator, inputs, grad_output.contiguous())
        spread = inputs if far_gradient else [far(x.detach()).requires_grad_(), *inputs[1:]]
        results = evaluate(operator, spread, grad_output)
    for value, peer in zip(results, expected, strict=True):
        assert torch.equal(value, peer)


def test_attention_and_fusion():
    require("triton")
    device = device_of("triton")
    maps = [randn(1, 2, 4, 5).to(device) for _ in range(5)]
    q, k, v, conv, mlp = (t.requires_grad_() for t in maps)
    temperature = torch.ones(1, 1, 1, device=device, dtype=torch.float16)
    scalars = [randn(1).to(device) for _ in range(3)]

    def run(q, k, v, conv, mlp):
        return mirage_kernels.channel_attention_fusion(q, k, v, temperature, 1, conv, mlp, *scalars)

    with mirage_kernels.use("triton"):
        grad_output = randn(1, 6, 4, 5).to(device)
        expected = evaluate(run, [q, k, v, conv, mlp], grad_output)
        spread = [far(q.detach()).requires_grad_(), k, far(v.detach()).requires_grad_(), conv, mlp]
        results = evaluate(run, spread, far(grad_output))
    for value, peer in zip(results, expected, strict=True):
        assert torch.equal(value, peer)
