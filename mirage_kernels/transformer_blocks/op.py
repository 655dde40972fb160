"""The public function ``transformer_blocks`` and its registration with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime import dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, define, fake_like_x, run_or_explain, wants_gradient
from mirage_kernels.feed_forward_stage import cases as feed_forward_cases
from mirage_kernels.feed_forward_stage import op as feed_forward_op
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights, Form
from mirage_kernels.mixer_stage import cases as mixer_cases
from mirage_kernels.mixer_stage import op as mixer_op
from mirage_kernels.mixer_stage.weights import MixerWeights
from mirage_kernels.transformer_blocks import cpp
from mirage_kernels.transformer_blocks.cases import CASES
from mirage_kernels.transformer_blocks.reference import transformer_blocks as reference
from mirage_kernels.transformer_blocks.weights import EPS, WEIGHTS, BlockWeights, PackedBlocks, halves, of_mirage

_implementations = Implementations(__package__)


def transformer_blocks(x: Tensor, blocks: Sequence[BlockWeights]) -> Tensor:
    r"""MIRAGE blocks one after the other, each as ``mirage.blocks.TransformerBlock`` in eval mode.

    .. math::
        x_{i + 1} = \mathrm{feed\_forward\_stage}_i(\mathrm{mixer\_stage}_i(x_i))

    On the C++ library and in CUDA C++, where no gradient is wanted, all of them are one operator: the statistics that a
    backward pass would need are not kept, and on CPUs the sum between the halves of a block is written over. Elsewhere
    each block is the two operators :func:`mirage_kernels.mixer_stage` and :func:`mirage_kernels.feed_forward_stage`,
    with their gradients.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides. Under autocast it is rounded to its dtype.
        blocks: Of C channels each, at least one. See :class:`mirage_kernels.BlockWeights`; weights are floating point,
            of any dtype, and the batch norm uses the running statistics among them. As
            :class:`mirage_kernels.PackedBlocks` they are put in order faster.

    Returns:
        [B, C, H, W] of the dtype of `x` (of autocast's under autocast); in channels_last where `x` is, which costs a
        copy of `x` and of the result however many blocks there are, else contiguous.

    Raises:
        TypeError, ValueError: naming the argument or weight that has the wrong type, dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    _check_blocks(blocks)
    return run_or_explain(lambda: _run(x, blocks), lambda: _check_tensors(x, blocks))


def _run(x: Tensor, blocks: Sequence[BlockWeights]) -> Tensor:
    weights, eps = _packed(blocks)
    impl = dispatch.choose("transformer_blocks", x, otherwise="composite")
    if impl in ("cpp", "cuda") and not wants_gradient(x, *weights):
        return _composite.laid_out_like(_forward_op(x, weights, eps, impl), x)
    if not torch.compiler.is_compiling():
        dispatch.record("transformer_blocks", impl)
    y = x.contiguous() if impl != "torch" and _composite.is_channels_last(x) else x
    for i in range(len(eps) // EPS):
        mixer, feed_forward = _of_block(weights, i)
        norm1_eps, bn_eps, norm2_eps = eps[EPS * i : EPS * (i + 1)]
        y = mixer_op.mixer_stage(y, mixer, None, False, norm1_eps, bn_eps).y
        y = feed_forward_op.feed_forward_stage(y, *feed_forward, eps=norm2_eps)
    return _composite.laid_out_like(y, x)


def _packed(blocks: Sequence[BlockWeights]) -> tuple[list[Tensor], list[float]]:
    if isinstance(blocks, PackedBlocks):
        return blocks.weights, blocks.eps
    weights: list[Tensor] = []
    eps: list[float] = []
    for mixer, feed_forward, *of_block in blocks:
        weights += mixer
        weights += of_mirage(feed_forward)
        eps += of_block
    return weights, eps


def _check_blocks(blocks: Sequence[BlockWeights]) -> None:
    if len(blocks) == 0:
        raise ValueError("blocks: expected at least one, got none")
    if isinstance(blocks, PackedBlocks):
        return
    for block in blocks:
        if not isinstance(block, BlockWeights):
            raise TypeError(f"blocks: expected BlockWeights, got {type(block).__name__}")
        if not isinstance(block.mixer, MixerWeights):
            raise TypeError(f"mixer: expected MixerWeights, got {type(block.mixer).__name__}")
        if not isinstance(block.feed_forward, FeedForwardWeights):
            raise TypeError(f"feed_forward: expected FeedForwardWeights, got {type(block.feed_forward).__name__}")


def _check_tensors(x: Tensor, blocks: Sequence[BlockWeights]) -> None:
    weights, _ = _packed(blocks)
    for i in range(len(weights) // WEIGHTS):
        mixer, feed_forward = _of_block(weights, i)
        mixer_op.check(x, mixer)
        feed_forward_op.check(x, feed_forward)


def _of_block(weights: Sequence[Tensor], i: int) -> tuple[MixerWeights, FeedForwardWeights]:
    mixer, feed_forward = halves(weights, i)
    packed = FeedForwardWeights(*feed_forward)
    of_mirage(packed)  # nobody has asked whether these have all that a block of MIRAGE has
    return MixerWeights(*mixer), packed


def _forward(x: Tensor, weights: Sequence[Tensor], eps: Sequence[float], impl: str) -> Tensor:
    if impl == "cpp":
        dispatch.record("transformer_blocks", impl)
        return cpp.forward(x, weights, eps)
    problem = _implementations["cuda"].forward_problem(x, weights)
    if not problem:
        dispatch.record("transformer_blocks", impl)
        return _implementations["cuda"].forward(x, weights, eps)
    dispatch.decline("transformer_blocks", x, {"cuda": problem})
    y = x
    for i in range(len(eps) // EPS):
        mixer, feed_forward = halves(weights, i)
        y = mixer_op._forward(y, *mixer, None, False, eps[3 * i], eps[3 * i + 1], impl)[0]
        y = feed_forward_op._forward(y, *_of_stage(feed_forward, eps[3 * i + 2]), False, impl)[0]
    by_itself = dispatch.automatic(x)
    dispatch.record("transformer_blocks", "composite" if by_itself == "torch" else by_itself)
    return y


def _of_stage(weights: Sequence[Tensor], eps: float) -> tuple[Any, ...]:
    """What the operator of the second stage takes of MIRAGE's weights."""
    return *FeedForwardWeights(*weights), *Form(eps)


def _halves_in_turn(x: Tensor, weights: Sequence[Tensor], eps: Sequence[float], impl: str) -> Tensor:
    """The same of the two stages' operators."""
    y = x
    for i in range(len(eps) // EPS):
        mixer, feed_forward = halves(weights, i)
        y = mixer_op._forward_op(y, *mixer, None, False, eps[3 * i], eps[3 * i + 1], impl)[0]
        y = feed_forward_op._forward_op(y, *_of_stage(feed_forward, eps[3 * i + 2]), False, impl)[0]
    return y


def _plain(*args: Any) -> Tensor:
    return _halves_in_turn(*args[:-1], "composite")


_forward_op = define(
    "transformer_blocks",
    "(Tensor x, Tensor[] weights, float[] eps, str impl) -> Tensor",
    _forward,
    fake_like_x,
    autocast=(0,),
    plain=_plain,
    differentiable=_halves_in_turn,
)


def _flops(x: Any, weights: Any, *_: Any) -> int:
    """Of both stages of each."""
    total = 0
    for i in range(len(weights) // WEIGHTS):
        mixer, feed_forward = halves(weights, i)
        total += mixer_cases.flops(x, MixerWeights(*mixer)) + feed_forward_cases.flops(x, *feed_forward)
    return total


register_flops("transformer_blocks", _flops)
register(CASES, transformer_blocks, reference)
