"""The public function ``mixer_stage`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.flops import register_flops
from mirage_kernels._runtime.library import Implementations, Pass, accumulator, define_stage
from mirage_kernels.mixer_stage import composite, cpp
from mirage_kernels.mixer_stage.cases import CASES, flops
from mirage_kernels.mixer_stage.reference import MixerOutput
from mirage_kernels.mixer_stage.reference import mixer_stage as reference
from mirage_kernels.mixer_stage.weights import DESCRIPTION, LEARNED, MixerWeights, Statistics, shapes, statistics_shapes

_implementations = Implementations(__package__)
_COUNT = len(MixerWeights._fields)


def mixer_stage(
    x: Tensor,
    weights: MixerWeights,
    branch_scale: Tensor | None = None,
    training: bool = False,
    norm_eps: float = 1e-5,
    bn_eps: float = 1e-5,
) -> MixerOutput:
    r"""Layer norm, mixer and residual: the first half of a MIRAGE block.

    .. math::
        y = x + W_p \, \mathrm{fuse}(\mathrm{attention}(n_1), \mathrm{gated}(n_2), \mathrm{mlp}(n_3)), \qquad
        (n_1, n_2, n_3) = \mathrm{LN}(x)

    with the channel attention, the gated CNN with its generated 7x7 kernels and the per-pixel MLP of `mirage.blocks`,
    on a third of the channels each. Autograd keeps `x`, the weights and small statistics (a few d x d matrices a head,
    the generated kernels, the moments of the batch norm): backward recomputes the rest. On the C++ library each
    direction is one call of a kernel that works on tiles. On Triton forward is four launches, in training some more
    (see `mirage_kernels.mixer_stage.triton.forward`), and backward nine and the operators'. In CUDA C++ forward is
    three launches (up to 240 channels) and backward ten (in float32 up to 192), which leave seven maps of C / 3
    channels to each other. With more channels than those hold, and on devices that have none of these, both are a
    chain of operators with the same formulas (`mirage_kernels._composite`). Under ``use("torch")`` it is the reference
    expression with PyTorch's autograd, which keeps everything and can be differentiated twice.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides. Under autocast it is rounded to its dtype.
        weights: See :class:`MixerWeights`; floating point, of any dtype: each has its gradient in its own.
        branch_scale: [B], what stochastic depth multiplies the gated CNN's output of each sample by; None for 1. It
            has no gradient.
        training: Whether the batch norm of the gated CNN uses the statistics of the batch, through which gradients
            then flow, or the running ones. The caller updates the latter.
        norm_eps, bn_eps: Added to the variances.

    Returns:
        y, [B, C, H, W], of the dtype of `x` (of autocast's under autocast), in channels_last where `x` is, which costs
        a copy, else contiguous; and mean and biased variance that the batch norm used, [c], in the dtype of the
        accumulator (float32; float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device. In training also where
            a channel has one value only, as in ``nn.BatchNorm2d``.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    check(x, weights, branch_scale)
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x: expected more than 1 value per channel when training, got shape {list(x.shape)}")
    impl = dispatch.choose("mixer_stage", x, otherwise="composite")
    if impl == "torch":
        return reference(x, weights, branch_scale, training, norm_eps, bn_eps)
    y, *_, batch_mean, batch_var = _forward_op(x, *weights, branch_scale, training, norm_eps, bn_eps, impl)
    return MixerOutput(_composite.laid_out_like(y, x), batch_mean.detach(), batch_var.detach())


def check(x: Tensor, weights: MixerWeights, branch_scale: Tensor | None = None) -> None:
    """Raise what :func:`mixer_stage` raises of arguments that do not fit."""
    checks.check_tensor("x", x, ndim=4)
    channels = x.shape[1]
    if channels == 0 or channels % 3:
        raise ValueError(f"x: expected a positive multiple of 3 channels, got shape {list(x.shape)}")
    if not isinstance(weights, MixerWeights):
        raise TypeError(f"weights: expected MixerWeights, got {type(weights).__name__}")
    checks.check_tensor("temperature", weights.temperature, ndim=3)
    checks.check_tensor("gic2", weights.gic2, ndim=4)
    branch, heads, hidden = channels // 3, weights.temperature.shape[0], weights.gic2.shape[1]
    if heads == 0 or branch % heads:
        raise ValueError(f"temperature: expected a head count that divides {branch} channels, got {heads}")
    if hidden < branch:
        raise ValueError(f"gic2: expected at least {branch} input channels, got shape {list(weights.gic2.shape)}")
    expected = shapes(channels, heads, hidden)
    checks.check_tensors("x", x, weights, expected, "C channels of x, heads of temperature, h inputs of gic2")
    if branch_scale is not None:
        checks.check_tensor("branch_scale", branch_scale, ndim=1)
        checks.check_shape("branch_scale", branch_scale, (x.shape[0],), "one factor for each sample of x")
        checks.check_same_device("x", x, branch_scale=branch_scale)


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (*rest, impl) = MixerWeights(*arguments[:_COUNT]), arguments[_COUNT:]
    module: Any = cpp
    if impl != "cpp":
        impl, module = _implementations.taking("mixer_stage", impl, x, weights)
    dispatch.record("mixer_stage", impl)
    if module is None:
        y, statistics = composite.forward(x, weights, *rest, impl)
    else:
        y, statistics = module.forward(x, weights, *rest)
    return y, *statistics


def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, dtype = MixerWeights(*arguments[:_COUNT]), accumulator(x.dtype)
    small = statistics_shapes(x.shape[0], x.shape[1], weights.temperature.shape[0])
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=dtype) for shape in small)


def _backward(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (branch_scale, *rest) = MixerWeights(*arguments[:_COUNT]), arguments[_COUNT:]
    statistics, (*options, impl) = Statistics(*rest[:5]), rest[5:]
    inputs = (grad_y, x, weights, branch_scale, statistics, *options)
    module: Any = cpp
    if impl != "cpp":
        impl, module = _implementations.taking("mixer_stage_backward", impl, x, weights)
    return composite.backward(*inputs, impl) if module is None else module.backward(*inputs)


def _backward_fake(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights = MixerWeights(*arguments[:_COUNT])
    return x.new_empty(x.shape), *(t.new_empty(t.shape) for t in (getattr(weights, name) for name in LEARNED))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, branch_scale = inputs[0], MixerWeights(*inputs[1 : _COUNT + 1]), inputs[_COUNT + 1]
    ctx.options = inputs[_COUNT + 2 :]
    # The running statistics change before backward; what it needs of them is in batch_mean and batch_var.
    learned = (getattr(weights, name) for name in LEARNED)
    ctx.save_for_backward(x, branch_scale, *output[1:], *learned)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, *unused: None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * (_COUNT + 6)
    x, branch_scale, *saved = ctx.saved_tensors  # to be read once: checkpointing recomputes at the first reading
    statistics, learned = saved[:5], dict(zip(LEARNED, saved[5:], strict=True))
    weights = MixerWeights(**learned, bn_mean=statistics[3], bn_var=statistics[4])
    grad_x, *grads = _backward_op(grad_y, x, *weights, branch_scale, *statistics, *ctx.options)
    by_name = dict(zip(LEARNED, grads, strict=True))
    return grad_x, *(by_name.get(name) for name in MixerWeights._fields), *(None,) * 5


_INPUTS, _OPTIONS = f"{DESCRIPTION.schema}, Tensor? branch_scale", "bool training, float norm_eps, float bn_eps"
_STATISTICS = ", ".join(f"Tensor {name}" for name in Statistics._fields)
_forward_op, _backward_op = define_stage(
    "mixer_stage",
    Pass(_forward, _forward_fake, f"{_INPUTS}, {_OPTIONS}", 1 + len(Statistics._fields)),
    Pass(_backward, _backward_fake, f"{_INPUTS}, {_STATISTICS}, {_OPTIONS}", 1 + len(LEARNED)),
    _setup_context,
    _autograd,
)
register_flops("mixer_stage", lambda x, *arguments: flops(x, MixerWeights(*arguments[:_COUNT])))
register(CASES, mixer_stage, reference)
