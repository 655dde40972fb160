"""The weights of ``feed_forward_stage``: names, order and shapes."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from mirage_kernels._runtime.weights import Description, Weight, sizes

C, M = sizes("C M")


class FeedForwardWeights(NamedTuple):
    """Parameters of a gated half of a block with C channels, in the shapes that PyTorch's modules hold them; M is
    the number of pairs of hidden channels. Biases may be None; MIRAGE has the norm's only. `excite` and its bias are
    what NAFNet's first half multiplies the means of gated channels by; `dwconv` is absent from its second."""

    norm_weight: Annotated[Tensor, Weight(C, around=1)]  # of norm2
    norm_bias: Annotated[Tensor | None, Weight(C, optional=True)]
    project_in: Annotated[Tensor, Weight(2 * M, C, 1, 1, per="pixel")]
    dwconv: Annotated[Tensor | None, Weight(2 * M, 1, 3, 3, per="pixel", optional=True)]
    project_out: Annotated[Tensor, Weight(C, M, 1, 1, per="pixel")]
    project_in_bias: Annotated[Tensor | None, Weight(2 * M, optional=True)] = None
    dwconv_bias: Annotated[Tensor | None, Weight(2 * M, optional=True)] = None
    project_out_bias: Annotated[Tensor | None, Weight(C, optional=True)] = None
    excite: Annotated[Tensor | None, Weight(M, M, 1, 1, per="sample", optional=True)] = None
    excite_bias: Annotated[Tensor | None, Weight(M, optional=True, around=1)] = None


DESCRIPTION = Description(FeedForwardWeights)
COUNT = len(FeedForwardWeights._fields)
OF_MIRAGE = FeedForwardWeights._fields[:5]
"""The weights that MIRAGE's blocks have."""
NOT_OF_MIRAGE = FeedForwardWeights._fields[5:]
CONVOLUTION_BIASES, EXCITATION = NOT_OF_MIRAGE[:3], NOT_OF_MIRAGE[3:]
ACTIVATIONS = ("gelu", "none")
"""What follows project_in, and what the gate is of the first half of the hidden channels."""


class Form(NamedTuple):
    """What a stage computes of its weights; the defaults are MIRAGE's."""

    eps: float = 1e-5
    norm: str = "centred"  # see mirage_kernels._runtime.norms
    activation: str = "gelu"
    gate: str = "gelu"


def beyond_mirage(weights: FeedForwardWeights, form: Form) -> str:
    """Why kernels for MIRAGE's stage alone do not take another one; empty where it is MIRAGE's."""
    if form.activation != "gelu":
        return "its kernels have a GELU after project_in"
    if form.gate != "gelu" or weights.dwconv is None or weights.excite is not None:
        return "its kernels have a depthwise convolution and a gate by GELU alone"
    if form.norm != "centred" or weights.norm_bias is None:
        return "its kernels have a centred norm with a bias"
    if any(getattr(weights, name) is not None for name in CONVOLUTION_BIASES):
        return "its kernels have convolutions without biases"
    return ""


def shapes(channels: int, pairs: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, for `channels` of x and `pairs` of hidden channels."""
    return DESCRIPTION.shapes(C=channels, M=pairs)
