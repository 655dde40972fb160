"""``mixer_stage`` backward in Triton: what forward computed is computed again, and the gradient goes back through it in
nine kernels of its own, among those of the operators.

For each product the kernels write both factors of its weight's gradient; `weight_gradient` multiplies them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mirage_kernels import _composite
from mirage_kernels._runtime.library import is_exact
from mirage_kernels._triton.config import next_power_of_2
from mirage_kernels._triton.launch import is_flat_plane, launch, plane_strides, pointers, precision_of_widened
from mirage_kernels._triton.tiles import ImageTile, filling_tile
from mirage_kernels._triton.weight_gradient import product_over_pixels
from mirage_kernels.channel_attention.triton.backward import softmax_backward
from mirage_kernels.channel_layer_norm import triton as channel_layer_norm
from mirage_kernels.mixer_stage.triton.backward_pixel_kernels import (
    batch_norm_sums_kernel,
    input_gradient_kernel,
    mlp_gradient_kernel,
)
from mirage_kernels.mixer_stage.triton.backward_sample_kernels import (
    batch_norm_kernel,
    generator_kernel,
    outer_products_kernel,
)
from mirage_kernels.mixer_stage.triton.backward_tile_kernels import (
    fusion_gradient_kernel,
    gated_gradient_kernel,
    query_key_gradient_kernel,
)
from mirage_kernels.mixer_stage.triton.forward import prepare
from mirage_kernels.mixer_stage.triton.plan import Plan, plan_of
from mirage_kernels.mixer_stage.weights import LEARNED, TAPS, BatchNorm, MixerWeights, Statistics


class _Problem(NamedTuple):
    """What all steps read."""

    x: Tensor
    w: MixerWeights  # contiguous
    scale: Tensor | None
    bn: BatchNorm
    bn_eps: float
    normal: Tensor  # [B, 3c, H, W], the layer norm's output, and its statistics [B, H, W]
    mean: Tensor
    rstd: Tensor
    qkv: Tensor  # [B, 3c, H, W] before the depthwise convolution
    detail: Tensor  # [B, c, H, W] before the generated kernels
    statistics: Statistics
    plan: Plan

    def empty(self, channels: int) -> Tensor:
        batch, _, height, width = self.x.shape
        return self.x.new_empty(batch, channels, height, width)

    def of_batch_norm(self) -> dict[str, Tensor]:
        """Arguments of kernels that compute its output again."""
        statistics = {"p_bn_mean": self.bn.batch_mean, "p_bn_var": self.bn.batch_var}
        return statistics | pointers(self.w, "bn_weight", "bn_bias")

    def sizes(self) -> dict[str, Any]:
        return {
            "BRANCH": self.plan.branch,
            "BLOCK_B": self.plan.block_b,
            "INT64": self.plan.wide,
            "PRECISION": self.plan.precision,
        }

    @property
    def tile(self) -> ImageTile:
        """The tile of the kernels that work on tiles of the image."""
        return filling_tile(self.x, 32)

    def tiled(self) -> dict[str, Any]:
        return {**self.sizes(), "BLOCK_H": self.tile.block_h, "BLOCK_W": self.tile.block_w, "num_stages": 1}


def backward(
    grad_y: Tensor,
    x: Tensor,
    w: MixerWeights,
    branch_scale: Tensor | None,
    statistics: Statistics,
    training: bool,
    norm_eps: float,
    bn_eps: float,
) -> tuple[Tensor, ...]:
    """The gradients of x and of `LEARNED`, each in its own dtype, as `composite.backward`."""
    learned, grad_y = w, grad_y.contiguous()
    w = MixerWeights(*(t.contiguous() for t in w))
    plan, bn = plan_of(x, w), BatchNorm(*statistics[2:])
    normal, mean, rstd = channel_layer_norm.forward(x, w.norm_weight, w.norm_bias, norm_eps, x.dtype)
    sums = x.new_empty(0, dtype=torch.float32)  # of the branch's input, which forward has kept
    qkv, detail, _ = prepare(x, w, sums, bn.batch_mean, bn.batch_var, norm_eps, bn_eps, plan)
    scale = None if branch_scale is None else branch_scale.contiguous()
    problem = _Problem(x, w, scale, bn, bn_eps, normal, mean, rstd, qkv, detail, statistics, plan)

    grads: dict[str, Tensor] = {}
    grad_conv, grad_mlp, grad_qkv, total = _fusion(problem, grad_y, grads)
    grads["proj_out"] = product_over_pixels(grad_conv, total)
    del total
    grad_projected = _attention(problem, grad_qkv, grads)
    del grad_qkv
    grad_mlp_input = _mlp(problem, grad_mlp, grads)
    del grad_mlp
    grad_bn, grad_total, coefficients = _gated(problem, grad_conv, training, grads)
    del grad_conv
    of_branches = (grad_projected, grad_bn, grad_total, grad_mlp_input, coefficients)
    grad_x, grads["norm_weight"], grads["norm_bias"] = _input(problem, grad_y, *of_branches)
    weights = ((grads[name], getattr(learned, name)) for name in LEARNED)
    return grad_x, *(g.reshape(t.shape).to(t.dtype) for g, t in weights)


def _fusion(p: _Problem, grad_y: Tensor, grads: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the outputs of the gated CNN and of the MLP, of v (in that of qkv), and what proj_out multiplied."""
    plan, (batch, channels, height, width) = p.plan, p.x.shape
    programs = p.tile.programs(p.x)
    fused, grad_qkv = p.empty(channels), p.empty(channels)
    total, grad_conv, grad_mlp = (p.empty(plan.branch) for _ in range(3))
    tiles = programs // batch
    grad_attn = torch.empty(batch, plan.heads, tiles, plan.d, plan.d, dtype=torch.float32, device=p.x.device)
    grad_alphas = torch.empty(programs, 3, dtype=torch.float32, device=p.x.device)
    w = p.w
    launch(
        fusion_gradient_kernel,
        programs,
        p.x.device,
        p_normal=p.normal,
        p_qkv=p.qkv,
        p_qkv_taps=w.qkv_dwconv,
        p_matrices=p.statistics.attention,
        p_detail=p.detail,
        p_kernels=p.statistics.kernels,
        **p.of_batch_norm(),
        **pointers(w, "gic1", "gate_temperature", "gic2", "proj_out", "mlp_in", "mlp_out", "project_out"),
        **pointers(w, "alpha_att", "alpha_conv", "alpha_mlp"),
        p_branch_scale=p.x if p.scale is None else p.scale,
        p_grad_y=grad_y,
        p_fused=fused,
        p_total=total,
        p_grad_conv=grad_conv,
        p_grad_mlp=grad_mlp,
        p_grad_qkv=grad_qkv,
        p_grad_attn=grad_attn,
        p_grad_alphas=grad_alphas,
        bn_eps=p.bn_eps,
        H=height,
        W=width,
        HEADS=plan.heads,
        HIDDEN=w.gic2.shape[1],
        tiles=tiles,
        **p.tiled(),
        D=plan.d,
        BLOCK_K=32 if plan.block_b * p.x.itemsize <= 128 and not is_exact(p.x.dtype) else 16,
        SCALE=p.scale is not None,
        num_warps=8,
    )
    grads["project_out"] = product_over_pixels(grad_y, fused)
    grads["alpha_att"], grads["alpha_conv"], grads["alpha_mlp"] = grad_alphas.sum(0)
    parts = grad_attn.sum(2, keepdim=True)
    small, grads["temperature"] = softmax_backward(parts, 1, w.temperature, p.statistics.attention)
    launch(
        query_key_gradient_kernel,
        plan.heads * programs,
        p.x.device,
        p_qkv=p.qkv,
        p_taps=w.qkv_dwconv,
        p_small=small,
        p_grad_qkv=grad_qkv,
        H=height,
        W=width,
        HEADS=plan.heads,
        tiles=tiles,
        D=plan.d,
        BLOCK_D=max(16, triton.next_power_of_2(plan.d)),
        BLOCK_H=p.tile.block_h,
        BLOCK_W=p.tile.block_w,
        INT64=plan.wide,
        PRECISION=precision_of_widened(p.x.dtype),
        num_warps=4,
        num_stages=1,
    )
    return grad_conv, grad_mlp, grad_qkv, total


def _attention(p: _Problem, grad_qkv: Tensor, grads: dict[str, Tensor]) -> Tensor:
    """The gradient of q, k and v before their depthwise convolution."""
    taps = p.w.qkv_dwconv.to(p.x.dtype).transpose(0, 1).expand(p.x.shape[0], -1, -1, -1)
    grad_projected, of_samples = _composite.depthwise_backward(grad_qkv, p.qkv, taps, "triton")
    grads["qkv_dwconv"] = of_samples.sum(0, dtype=torch.float32)
    grads["qkv"] = product_over_pixels(grad_projected, p.normal[:, : p.plan.branch])
    return grad_projected


def _pixel_programs(p: _Problem) -> int:
    return p.x.shape[0] * triton.cdiv(p.x.shape[2] * p.x.shape[3], p.plan.block_n)


def _mlp(p: _Problem, grad_mlp: Tensor, grads: dict[str, Tensor]) -> Tensor:
    """The gradient of the MLP's input."""
    branch = p.plan.branch
    hidden, grad_hidden, grad_input = p.empty(2 * branch), p.empty(2 * branch), p.empty(branch)
    launch(
        mlp_gradient_kernel,
        _pixel_programs(p),
        p.x.device,
        p_normal=p.normal,
        **pointers(p.w, "mlp_in", "mlp_out"),
        p_grad_mlp=grad_mlp,
        p_hidden=hidden,
        p_grad_hidden=grad_hidden,
        p_grad_input=grad_input,
        N=p.x.shape[2] * p.x.shape[3],
        **p.sizes(),
        BLOCK_K=16,
        BLOCK_N=p.plan.block_n,
        num_warps=4,
        num_stages=1,
    )
    grads["mlp_out"] = product_over_pixels(grad_mlp, hidden)
    grads["mlp_in"] = product_over_pixels(grad_hidden, p.normal[:, 2 * branch :])
    return grad_input


def _gated(p: _Problem, grad_conv: Tensor, training: bool, grads: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the batch norm's output and of the sum before proj_out, and what makes the first that of its input:
    [B, 3, c], factors of itself and of that input, and what is added."""
    w, plan, hidden = p.w, p.plan, p.w.gic2.shape[1]
    branch, pixels = plan.branch, p.x.shape[2] * p.x.shape[3]
    programs = p.tile.programs(p.x)
    product, grad_gates = p.empty(hidden), p.empty(2 * hidden - branch)
    normal, grad_total, grad_bn, grad_content = (p.empty(branch) for _ in range(4))
    grad_temperature = torch.empty(programs, dtype=torch.float32, device=p.x.device)
    launch(
        gated_gradient_kernel,
        programs,
        p.x.device,
        p_normal=p.normal,
        p_detail=p.detail,
        p_kernels=p.statistics.kernels,
        **p.of_batch_norm(),
        **pointers(w, "gic1", "gate_temperature", "gic2", "proj_out"),
        p_branch_scale=p.x if p.scale is None else p.scale,
        p_grad_conv=grad_conv,
        p_bn=normal,
        p_product=product,
        p_grad_total=grad_total,
        p_grad_gates=grad_gates,
        p_grad_bn=grad_bn,
        p_grad_content=grad_content,
        p_grad_temperature=grad_temperature,
        bn_eps=p.bn_eps,
        H=p.x.shape[2],
        W=p.x.shape[3],
        HIDDEN=hidden,
        **p.tiled(),
        BLOCK_K=_gated_block(plan, is_exact(p.x.dtype), p.tile.pixels),
        SCALE=p.scale is not None,
        num_warps=8,
    )
    grads["gate_temperature"] = -grad_temperature.sum() / w.gate_temperature.to(torch.float32)
    grads["gic2"] = product_over_pixels(grad_total, product)
    of_gates = product_over_pixels(grad_gates, normal)
    del product, grad_gates
    kernels = p.statistics.kernels.view(-1, branch, 7, 7)
    grad_detail, grad_kernels = _composite.depthwise_backward(grad_content, p.detail, kernels, "triton")
    of_generator = generator_gradients(grad_kernels, w, p.bn, p.bn_eps)
    grads["generator_in"], grads["generator_out"] = of_generator.first, of_generator.second
    grads["gic1"] = torch.cat((of_gates, product_over_pixels(grad_detail, normal) + of_generator.detail_rows))
    sums = torch.empty(_pixel_programs(p), 2, branch, dtype=torch.float32, device=p.x.device)
    launch(
        batch_norm_sums_kernel,
        _pixel_programs(p),
        p.x.device,
        p_normal=p.normal,
        p_bn_mean=p.bn.batch_mean,
        p_bn_var=p.bn.batch_var,
        p_detail_weight=w.gic1[-branch:],
        p_grad_detail=grad_detail,
        p_grad_bn=grad_bn,
        p_sums=sums,
        bn_eps=p.bn_eps,
        N=pixels,
        **p.sizes(),
        BLOCK_N=plan.block_n,
        num_warps=8 if is_exact(p.x.dtype) else 4,
        num_stages=1,
    )
    grads["bn_weight"], grads["bn_bias"], coefficients = batch_norm_gradients(
        sums.sum(0), of_generator.vectors, w.bn_weight, p.bn, p.bn_eps, pixels, training
    )
    return grad_bn, grad_total, coefficients


def _gated_block(plan: Plan, exact: bool, pixels: int) -> int:
    """Gated channels per step of the loop, chosen by compiling so that registers do not spill."""
    return 32 if plan.precision == "tf32" or (exact and plan.block_b * pixels < 1024) else 16


def _input(
    p: _Problem,
    grad_y: Tensor,
    grad_projected: Tensor,
    grad_bn: Tensor,
    grad_total: Tensor,
    grad_mlp_input: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the layer norm's weight and bias."""
    batch, channels, height, width = p.x.shape
    grad_x = p.empty(channels)
    sums = torch.empty(_pixel_programs(p), 2, channels, dtype=torch.float32, device=p.x.device)
    launch(
        input_gradient_kernel,
        _pixel_programs(p),
        p.x.device,
        p_x=p.x,
        p_mean=p.mean,
        p_rstd=p.rstd,
        p_norm_weight=p.w.norm_weight,
        p_normal=p.normal,
        p_qkv_weight=p.w.qkv,
        p_grad_projected=grad_projected,
        p_grad_bn=grad_bn,
        p_grad_total=grad_total,
        p_grad_mlp_input=grad_mlp_input,
        p_coefficients=coefficients,
        p_grad_y=grad_y,
        p_grad_x=grad_x,
        p_sums=sums,
        N=height * width,
        W=width,
        **plane_strides(p.x),
        **p.sizes(),
        BLOCK_K=16,
        BLOCK_N=p.plan.block_n,
        LINE=is_flat_plane(p.x),
        num_warps=8,
        num_stages=1,
    )
    return grad_x, *sums.sum(0).unbind(0)


class GeneratorGradients(NamedTuple):
    """In float32."""

    vectors: Tensor  # [B, 6, c], for `batch_norm_gradients`
    detail_rows: Tensor  # [c, c]: of gic1's last rows
    first: Tensor  # [c, c]: of generator_in
    second: Tensor  # [49c, c]: of generator_out


def generator_gradients(grad_kernels: Tensor, w: MixerWeights, bn: BatchNorm, eps: float) -> GeneratorGradients:
    """From the gradient of the generated kernels [B, c, 7, 7], contiguous."""
    batch, branch = bn.branch_mean.shape
    block_b = max(16, next_power_of_2(branch))
    sizes = {"BRANCH": branch, "BLOCK_B": block_b, "BLOCK_R": max(16, 4096 // block_b)}
    vectors = grad_kernels.new_empty(batch, 6, branch, dtype=torch.float32)
    launch(
        generator_kernel,
        batch,
        vectors.device,
        p_branch_mean=bn.branch_mean,
        p_bn_mean=bn.batch_mean,
        p_bn_var=bn.batch_var,
        p_detail_weight=w.gic1[-branch:],
        **pointers(w, "bn_weight", "bn_bias", "generator_in", "generator_out"),
        p_grad_kernels=grad_kernels,
        p_vectors=vectors,
        bn_eps=eps,
        **sizes,
        num_warps=4,
    )
    rows = (TAPS + 2) * branch
    grads = vectors.new_empty(rows, branch)
    programs = triton.cdiv(rows, sizes["BLOCK_R"])
    launch(outer_products_kernel, programs, grads.device, vectors, grad_kernels, grads, batch, **sizes, num_warps=4)
    second, first, detail_rows = grads.split((TAPS * branch, branch, branch))
    return GeneratorGradients(vectors, detail_rows, first, second)


def batch_norm_gradients(
    sums: Tensor, vectors: Tensor, bn_weight: Tensor, bn: BatchNorm, eps: float, pixels: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight and bias, and what makes that of the output the one of the input: [B, 3, c], factors of
    itself and of that input, and what is added. `sums` [2, c]: see the kernel."""
    batch, branch = bn.branch_mean.shape
    grads, coefficients = vectors.new_empty(2, branch), vectors.new_empty(batch, 3, branch)
    launch(
        batch_norm_kernel,
        1,
        grads.device,
        p_sums=sums,
        p_vectors=vectors,
        p_branch_mean=bn.branch_mean,
        p_bn_mean=bn.batch_mean,
        p_bn_var=bn.batch_var,
        p_bn_weight=bn_weight,
        p_grads=grads,
        p_coefficients=coefficients,
        bn_eps=eps,
        batch=batch,
        pixels=float(pixels),
        count=float(batch * pixels),
        BRANCH=branch,
        BLOCK_B=max(16, next_power_of_2(branch)),
        TRAINING=training,
        num_warps=1,
    )
    return *grads.unbind(0), coefficients
