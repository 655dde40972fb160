"""The public function ``tri_branch_fusion`` and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels._runtime import checks, dispatch
from mirage_kernels._runtime.cases import register
from mirage_kernels._runtime.library import Implementations, define
from mirage_kernels.tri_branch_fusion.cases import CASES
from mirage_kernels.tri_branch_fusion.checks import check_branch, check_scalars
from mirage_kernels.tri_branch_fusion.dtypes import concatenated, fusion_dtypes, widest
from mirage_kernels.tri_branch_fusion.reference import tri_branch_fusion as reference

_implementations = Implementations(__package__)


def tri_branch_fusion(
    att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor
) -> Tensor:
    r"""Each of MIRAGE's three branches modulated by the other two, concatenated over channels.

    .. math:: \mathrm{out} = [\, a + \lambda_a \sigma(g + m),\; g + \lambda_g \sigma(a + m),\;
        m + \lambda_m \sigma(a + g) \,]

    with a, g, m for `att`, `conv`, `mlp`: the fusion before ``project_out`` in a MIRAGE block.

    Args:
        att, conv, mlp: [B, C, H, W], float32, float64, float16 or bfloat16, any strides.
        l_att, l_conv, l_mlp: The three weights, [1] or [].

    Returns:
        [B, 3C, H, W], contiguous, of the dtype that the arguments promote to in the reference expression: 16-bit
        branches with float32 weights of shape [1] give float32.

    Raises:
        TypeError, ValueError: naming the argument that has the wrong dtype, shape or device.
        RuntimeError: if an implementation was forced that cannot run (see :func:`mirage_kernels.use`).
    """
    checks.check_tensor("att", att, ndim=4)
    check_branch("conv", conv, "att", att)
    check_branch("mlp", mlp, "att", att)
    check_scalars("att", att, l_att=l_att, l_conv=l_conv, l_mlp=l_mlp)
    main = widest(att, conv, mlp, l_att, l_conv, l_mlp)
    impl = dispatch.choose("tri_branch_fusion", main)
    if impl == "torch":
        return reference(att, conv, mlp, l_att, l_conv, l_mlp)
    return _forward_op(att, conv, mlp, l_att, l_conv, l_mlp, impl)


def _forward(
    att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor, impl: str
) -> Tensor:
    dispatch.record("tri_branch_fusion", impl)
    return _implementations[impl].forward(att, conv, mlp, l_att, l_conv, l_mlp)


def _forward_fake(
    att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor, impl: str
) -> Tensor:
    return att.new_empty(concatenated(att), dtype=fusion_dtypes(att, conv, mlp, l_att, l_conv, l_mlp)[1])


def _backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, impl = arguments
    return _implementations[impl].backward(grad_out, *tensors)


def _backward_fake(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _ = arguments
    return tuple(t.new_empty(t.shape) for t in tensors)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 7
    return *_backward_op(grad_out, *ctx.saved_tensors, ctx.impl), None


_backward_op = define(
    "tri_branch_fusion_backward",
    "(Tensor grad_out, Tensor att, Tensor conv, Tensor mlp, Tensor l_att, Tensor l_conv, Tensor l_mlp, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = define(
    "tri_branch_fusion",
    "(Tensor att, Tensor conv, Tensor mlp, Tensor l_att, Tensor l_conv, Tensor l_mlp, str impl) -> Tensor",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    plain=lambda *args: reference(*args[:-1]),
)
register(CASES, tri_branch_fusion, reference)
