"""The public function ``feed_forward_stage`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mirage_kernels import _checks, _dispatch
from mirage_kernels._library import Implementations, define
from mirage_kernels.channel_layer_norm import channel_layer_norm
from mirage_kernels.feed_forward_stage.reference import feed_forward_stage as reference
from mirage_kernels.gated_depthwise_ffn import gated_depthwise_ffn

_implementations = Implementations(__package__)


def feed_forward_stage(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer norm, feed-forward network and residual: the second half of a MIRAGE block.

    .. math::
        y = x + W_o (\mathrm{gelu}(d_1) \odot d_2), \qquad
        d = \mathrm{depthwise}_{3\times3}(\mathrm{gelu}(W_i \, \mathrm{LN}(x)))

    On the C++ library and without autograd it is one pass: the hidden tensor of 2M channels exists a tile at a time,
    in cache. Where a gradient is wanted, under autocast, and on Triton it is made of the operators
    `channel_layer_norm` and `gated_depthwise_ffn` and two 1x1 convolutions.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides.
        norm_weight, norm_bias: [C]. project_in: [2M, C, 1, 1]. dwconv: [2M, 1, 3, 3]. project_out: [C, M, 1, 1].
            All of the dtype of `x` (autocast aside).
        eps: Added to the variance.

    Returns:
        [B, C, H, W], contiguous, of the dtype of `x`.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    weights = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "project_in": project_in,
        "dwconv": dwconv,
        "project_out": project_out,
    }
    _check(x, weights)
    impl = _dispatch.choose("feed_forward_stage", x)
    if impl == "torch":
        return reference(x, **weights, eps=eps)
    autocast = torch.is_autocast_enabled(x.device.type)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights.values()))
    if impl == "cpp" and not wanted and not autocast:
        _checks.check_same_dtype("x", x, **weights)
        return _forward_op(x, norm_weight, norm_bias, project_in, dwconv, project_out, eps, impl)
    if not torch.compiler.is_compiling():
        _dispatch.record("feed_forward_stage", impl)
    hidden = F.conv2d(channel_layer_norm(x, norm_weight, norm_bias, eps), project_in)
    return x + F.conv2d(gated_depthwise_ffn(hidden, dwconv), project_out)


def _check(x: Tensor, weights: dict[str, Tensor]) -> None:
    _checks.check_tensor("x", x, ndim=4)
    for name, value in weights.items():
        _checks.check_tensor(name, value, ndim=1 if name.startswith("norm") else 4)
    channels, hidden = x.shape[1], weights["project_out"].shape[1]
    shapes = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "project_in": (2 * hidden, channels, 1, 1),
        "dwconv": (2 * hidden, 1, 3, 3),
        "project_out": (channels, hidden, 1, 1),
    }
    for name, shape in shapes.items():
        _checks.check_shape(name, weights[name], shape, "C channels of x, M inputs of project_out")
    _checks.check_same_device("x", x, **weights)


def _forward(*arguments: Any) -> Tensor:
    *inputs, impl = arguments
    _dispatch.record("feed_forward_stage", impl)
    return _implementations[impl].forward(*inputs)


def _forward_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


_forward_op = define(
    "feed_forward_stage",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor project_in, Tensor dwconv, Tensor project_out, "
    "float eps, str impl) -> Tensor",
    _forward,
    _forward_fake,
)


@register_flop_formula(torch.ops.mirage_kernels.feed_forward_stage)
def _flops(x: Any, norm_weight: Any, norm_bias: Any, project_in: Any, *rest: Any, **kwargs: Any) -> int:
    batch, channels, height, width = x
    doubled = project_in[0]  # 2M
    return 2 * batch * height * width * (doubled * channels + 9 * doubled + channels * doubled // 2)
