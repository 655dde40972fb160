"""The public function ``feed_forward_stage`` and its registration with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, Pass, define_stage, wants_gradient
from mirage_kernels._runtime.norms import check_norm
from mirage_kernels._runtime.weights import like, no_gradient, of_given
from mirage_kernels.feed_forward_stage import composite, cpp
from mirage_kernels.feed_forward_stage.cases import CASES, flops
from mirage_kernels.feed_forward_stage.reference import feed_forward_stage as reference
from mirage_kernels.feed_forward_stage.weights import (
    ACTIVATIONS,
    COUNT,
    DESCRIPTION,
    NOT_OF_MIRAGE,
    FeedForwardWeights,
    Form,
    beyond_mirage,
    shapes,
)

_implementations = Implementations(__package__)


def feed_forward_stage(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in: Tensor,
    dwconv: Tensor | None,
    project_out: Tensor,
    project_in_bias: Tensor | None = None,
    dwconv_bias: Tensor | None = None,
    project_out_bias: Tensor | None = None,
    excite: Tensor | None = None,
    excite_bias: Tensor | None = None,
    eps: float = 1e-5,
    keep_hidden: bool = False,
    *,
    norm: str = "centred",
    activation: str = "gelu",
    gate: str = "gelu",
) -> Tensor:
    r"""Norm over channels, gated feed-forward network and residual: the second half of a block.

    .. math::
        y = x + W_o (s \odot g), \qquad g = \sigma(d_1) \odot d_2, \qquad
        d = \mathrm{depthwise}_{3\times3}(a(W_i \, \mathrm{norm}(x)))

    where the activation a and the gate :math:`\sigma` are GELU in MIRAGE; a is nothing in Restormer and the networks
    that descend from it, and so is :math:`\sigma` in NAFNet (Chen et al., "Simple Baselines for Image Restoration",
    ECCV 2022), whose halves both are such a network. Its first multiplies the gated channels by
    :math:`s = W_s \bar g`, of their means over the plane ("simplified channel attention"); elsewhere s is 1. Its
    second has no depthwise convolution, d = a.

    Autograd keeps `x` and the weights, no tensor of 2M channels: backward recomputes what it needs. On the C++ library
    forward is one pass in which the hidden tensor exists a tile at a time, in cache; with `excite` two, between which
    the gated channels lie in memory. The other kernels are for MIRAGE's stage: a GELU, a centred norm with a bias, no
    other weights. On Triton it is two launches with the activated hidden tensor between them, and backward four, for
    images that fill a GPU. In CUDA C++ forward is one launch (two for small images) and backward three (up to 240
    channels, in float32 96; Triton's for more), each after one that packs the weights; the hidden tensor exists a tile
    at a time, in shared memory. For others, and on devices that have none of these, both are a chain of operators with
    the same formulas (`mirage_kernels._composite`). Under ``use("torch")`` it is the reference expression with
    PyTorch's autograd, which keeps everything and can be differentiated twice.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides. Under autocast it is rounded to its dtype.
        norm_weight, norm_bias: [C]. project_in: [2M, C, 1, 1]. dwconv: [2M, 1, 3, 3]. project_out: [C, M, 1, 1].
            Floating point, of any dtype: each has its gradient in its own. norm_bias may be None.
            dwconv is None where there is no depthwise convolution.
        project_in_bias, dwconv_bias: [2M]. project_out_bias: [C]. Of the three convolutions, or None.
        excite: [M, M, 1, 1], :math:`W_s`, or None. excite_bias: [M], added to s, or None.
        eps: Added to the variance.
        keep_hidden: Keep the output of `project_in` too, 2M channels in the dtype of `x`: more memory, and backward
            has less to recompute. Without effect where no gradient is wanted, and on Triton, whose backward would
            take longer to read them than to compute them again.
        norm: ``"centred"``, LayerNorm; or ``"uncentred"``, x over its deviation, from which the mean is not
            subtracted: the norm "BiasFree" of Restormer.
        activation, gate: a and :math:`\sigma`, ``"gelu"`` or ``"none"``.

    Returns:
        [B, C, H, W] of the dtype of `x` (of autocast's under autocast); in channels_last where `x` is, else contiguous.
        The kernels write it contiguous: channels_last costs a copy.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape, device or value.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    convolution_biases = project_in_bias, dwconv_bias, project_out_bias
    excitation = excite, excite_bias
    weights = FeedForwardWeights(
        norm_weight, norm_bias, project_in, dwconv, project_out, *convolution_biases, *excitation
    )
    form = Form(eps, norm, activation, gate)
    check(x, weights, form)
    impl = dispatch.choose("feed_forward_stage", x, otherwise="composite")
    if impl == "torch":
        return reference(x, *weights, *form)
    keep = keep_hidden and wants_gradient(x, *weights) and impl not in ("triton", "cuda")
    return _composite.laid_out_like(_forward_op(x, *weights, *form, keep, impl)[0], x)


_MIRAGE = Form()


def check(x: Tensor, weights: FeedForwardWeights, form: Form = _MIRAGE) -> None:
    """Raise what :func:`feed_forward_stage` raises of arguments that do not fit."""
    checks.check_tensor("x", x, ndim=4)
    checks.check_tensor("project_out", weights.project_out, ndim=4)
    expected = shapes(x.shape[1], weights.project_out.shape[1])
    why = "C channels of x, M inputs of project_out"
    checks.check_tensors("x", x, weights, expected, why, DESCRIPTION.optional)
    for bias, of in (("dwconv_bias", "dwconv"), ("excite_bias", "excite")):
        if getattr(weights, of) is None and getattr(weights, bias) is not None:
            raise ValueError(f"{bias}: expected None where there is no {of}, got a tensor")
    check_norm(form.norm)
    for name, value in (("activation", form.activation), ("gate", form.gate)):
        if value not in ACTIVATIONS:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {value!r}")


def _split(arguments: Sequence[Any]) -> tuple[FeedForwardWeights, Sequence[Any]]:
    """The weights that arguments begin with, and the rest."""
    return FeedForwardWeights(*arguments[:COUNT]), arguments[COUNT:]


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weights, (*form_of, keep_hidden, impl) = _split(arguments)
    form = Form(*form_of)
    if impl == "cpp":
        dispatch.record("feed_forward_stage", impl)
        return cpp.forward(x, weights, form, keep_hidden)
    other = beyond_mirage(weights, form)
    impl, module = _implementations.taking("feed_forward_stage", impl, x, weights.project_out, keep_hidden, other)
    dispatch.record("feed_forward_stage", impl)
    if module is None:
        return composite.forward(x, weights, form, keep_hidden, impl)
    if module is cpp:
        return cpp.forward(x, weights, form, keep_hidden)
    return module.forward(x, weights, form), x.new_empty(0)


def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weights, (*_, keep_hidden, _) = _split(arguments)
    hidden = (x.shape[0], weights.project_in.shape[0], x.shape[2], x.shape[3]) if keep_hidden else 0
    return x.new_empty(x.shape), x.new_empty(hidden)


def _backward(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (hidden, *form_of, impl) = _split(arguments)
    form = Form(*form_of)
    if impl == "cpp":
        return cpp.backward(grad_y, x, weights, hidden, form)
    name, other = "feed_forward_stage_backward", beyond_mirage(weights, form)
    impl, module = _implementations.taking(name, impl, x, weights.project_out, hidden.dim() == 4, other)
    if module is None:
        return composite.backward(grad_y, x, weights, hidden, form, impl)
    if module is cpp:
        return cpp.backward(grad_y, x, weights, hidden, form)
    return *module.backward(grad_y, x, weights, form), *(no_gradient(x) for _ in NOT_OF_MIRAGE)


def _backward_fake(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, _ = _split(arguments)
    return x.new_empty(x.shape), *like(weights)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, *arguments = inputs
    weights, (*ctx.form, _, ctx.impl) = _split(arguments)
    ctx.save_for_backward(x, *weights, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, unused: None) -> tuple[Any, ...]:
    rest = (None,) * (len(Form._fields) + 2)
    if grad_y is None:
        return (None,) * (1 + COUNT) + rest
    x, *weights, hidden = ctx.saved_tensors  # to be read once: checkpointing recomputes at the first reading
    grad_x, *grads = _backward_op(grad_y, x, *weights, hidden, *ctx.form, ctx.impl)
    return grad_x, *of_given(grads, weights), *rest


_WEIGHTS, _FORM = DESCRIPTION.schema, "float eps, str norm, str activation, str gate"
_forward_op, _backward_op = define_stage(
    "feed_forward_stage",
    Pass(_forward, _forward_fake, f"{_WEIGHTS}, {_FORM}, bool keep_hidden", 2),
    Pass(_backward, _backward_fake, f"{_WEIGHTS}, Tensor hidden, {_FORM}", 1 + COUNT),
    _setup_context,
    _autograd,
)
register_flops("feed_forward_stage", flops)
register(CASES, feed_forward_stage, reference)
