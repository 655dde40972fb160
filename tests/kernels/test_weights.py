"""Descriptions of stages' weights: what follows from them, and that C++ has the same names in the same order."""

from typing import Annotated, NamedTuple

import pytest
import torch
from harness import require
from torch import Tensor

from mirage_kernels import MixerWeights
from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.weights import (
    Description,
    Weight,
    capsules,
    empty_gradients,
    in_own_dtypes,
    like,
    of_given,
    sizes,
)
from mirage_kernels.feed_forward_stage import weights as feed_forward
from mirage_kernels.mixer_stage import weights as mixer

n, m = sizes("n m")


class Example(NamedTuple):
    scale: Annotated[Tensor, Weight(n, around=3)]
    expand: Annotated[Tensor, Weight(2 * m, n, 1, 1, per="pixel")]
    small: Annotated[Tensor, Weight(m, 2 * n, per="sample")]
    running: Annotated[Tensor, Weight(n, learned=False)]


def test_what_follows_from_a_description():
    description = Description(Example)
    shapes = description.shapes(n=3, m=5)
    assert shapes == {"scale": (3,), "expand": (10, 3, 1, 1), "small": (5, 6), "running": (3,)}
    assert description.learned == ("scale", "expand", "small")
    assert description.schema == "Tensor scale, Tensor expand, Tensor small, Tensor running"
    assert description.multiply_adds(tuple(shapes.values()), "pixel") == 30
    assert description.multiply_adds(tuple(shapes.values()), "sample") == 30
    values = description.ordinary(torch.Generator().manual_seed(0), n=300, m=200)
    assert list(values) == ["scale", "expand", "small"]
    assert (values["scale"] - 3).abs().mean() < 0.3
    x = torch.randn(300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert 0.9 < (values["expand"].flatten(1) @ x).std() < 1.1


def test_the_shapes_of_the_stages():
    """Those of a block of MIRAGE-T with 48 channels."""
    from mirage.blocks import TransformerBlock

    block = TransformerBlock(48, 2)
    attn, gated = block.attn, block.attn.gatedcnn
    found = mixer.shapes(48, 2, int(8 / 3 * 16))
    parameters = {
        "norm_weight": block.norm1.body.weight, "qkv": attn.qkv.weight, "qkv_dwconv": attn.qkv_dwconv.weight,
        "temperature": attn.temperature, "bn_mean": gated.norm.running_mean, "gic1": gated.gic1.weight,
        "generator_out": gated.kernel_generator[3].weight, "gic2": gated.gic2.weight, "mlp_in": attn.mlp[0].weight,
        "mlp_out": attn.mlp[2].weight, "alpha_mlp": attn.alpha_mlp, "project_out": attn.project_out.weight,
    }  # fmt: skip
    assert {name: found[name] for name in parameters} == {name: tuple(p.shape) for name, p in parameters.items()}
    assert mixer.LEARNED == tuple(name for name in MixerWeights._fields if name not in ("bn_mean", "bn_var"))
    found = feed_forward.shapes(48, 96)
    ffn = block.ffn
    parameters = (block.norm2.body.weight, ffn.project_in.weight, ffn.dwconv.weight, ffn.project_out.weight)
    assert [found[name] for name in ("norm_bias", "project_in", "dwconv", "project_out")] == [
        tuple(p.shape) for p in parameters
    ]


class WithOptional(NamedTuple):
    scale: Annotated[Tensor, Weight(n, around=1)]
    expand: Annotated[Tensor, Weight(m, n, 1, 1, per="pixel")]
    bias: Annotated[Tensor | None, Weight(m, optional=True)] = None


def test_optional_weights():
    description = Description(WithOptional)
    assert description.schema == "Tensor scale, Tensor expand, Tensor? bias"
    assert description.optional == {"bias"} and description.learned == WithOptional._fields
    assert description.multiply_adds([(3,), (5, 3, 1, 1), None], "pixel") == 15
    generator = torch.Generator().manual_seed(0)
    values = description.ordinary(generator, without=["bias"], n=3, m=5)
    assert list(values) == ["scale", "expand"]
    shapes = description.shapes(n=3, m=5)
    x = torch.zeros(1, 3, 2, 2)

    def check(*weights):
        checks.check_tensors("x", x, weights, shapes, "n channels of x", description.optional)

    scale, expand, bias = torch.ones(3), torch.ones(5, 3, 1, 1), torch.ones(5)
    check(scale, expand, None)
    check(scale, expand, bias)
    with pytest.raises(TypeError, match="expand: expected a tensor, got NoneType"):
        check(scale, None, None)
    with pytest.raises(ValueError, match=r"bias: expected shape \[5\] \(n channels of x\), got \[4\]"):
        check(scale, expand, bias[1:])
    with pytest.raises(ValueError, match="bias: expected a tensor on cpu like x, got meta"):
        check(scale, expand, bias.to("meta"))


def test_gradients_of_absent_weights():
    """None between kernels and for autograd, [0] where an operator returns them."""
    weights = [torch.ones(3, dtype=torch.bfloat16), None, torch.ones(2, 2)]
    memory = empty_gradients(weights, torch.float64)
    assert [None if g is None else g.shape for g in memory] == [(3,), None, (2, 2)]
    assert memory[0].dtype == memory[2].dtype == torch.float64
    returned = list(in_own_dtypes(memory, weights))
    assert [(g.shape, g.dtype) for g in returned] == [(g.shape, g.dtype) for g in like(weights)]
    assert returned[1].shape == (0,) and returned[2].dtype == torch.float32
    assert [g is None for g in of_given(returned, weights)] == [False, True, False]
    assert [c is None for c in capsules(weights)] == [False, True, False]


@pytest.mark.parametrize("impl", ["cpp", "cuda"])
def test_cpp_has_the_same_weights(impl):
    """In the same order: lists of tensors cross between the languages without names."""
    require(impl)
    library = {"cpp": dispatch.native, "cuda": dispatch.cuda}[impl]
    names = library.stage_weights
    assert names["mixer_stage"] == MixerWeights._fields
    assert names["mixer_stage_gradients"] == mixer.LEARNED
    assert names["mixer_stage_statistics"] == mixer.Statistics._fields
    for name in ("feed_forward_stage", "feed_forward_stage_gradients"):
        assert names[name] == feed_forward.FeedForwardWeights._fields
