"""Stages on regions in plain PyTorch: the definition, and what runs where the C++ library does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels._runtime.library import accumulator
from mirage_kernels.channel_layer_norm.reference import channel_layer_norm
from mirage_kernels.feed_forward_stage.reference import feed_forward_stage
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights, Form
from mirage_kernels.mixer_stage import gated_branch
from mirage_kernels.mixer_stage.weights import BatchNorm, MixerWeights
from mirage_kernels.regions.checks import RegionStatistics, Window
from mirage_kernels.tri_branch_fusion.reference import tri_branch_fusion


class _Part:
    """The pixels of a region with a halo: those that the map has, and how many are missing at each side."""

    def __init__(self, x: Tensor, window: Window, rows: list[int], columns: list[int], halo: int) -> None:
        self.halo = halo
        top, bottom, left, right = rows[0] - halo, rows[-1] + halo, columns[0] - halo, columns[-1] + halo
        # As F.pad takes it.
        self.missing = (max(0, -left), max(0, right - window.width), max(0, -top), max(0, bottom - window.height))
        first, second = max(0, top) - window.row, max(0, left) - window.column
        last, end = min(window.height, bottom) - window.row, min(window.width, right) - window.column
        self.pixels = x[:, :, first:last, second:end]

    def padded(self, values: Tensor, halo: int) -> Tensor:
        """Values at these pixels with zeros outside the map, cropped to a smaller halo."""
        values, cut = F.pad(values, self.missing), self.halo - halo
        return values[:, :, cut : values.shape[2] - cut, cut : values.shape[3] - cut]


def _steps(cuts: list[int]) -> list[slice]:
    """The pieces between the cuts, from the first of them on."""
    return [slice(a - cuts[0], b - cuts[0]) for a, b in zip(cuts, cuts[1:], strict=False)]


def sums(
    x: Tensor, w: MixerWeights, window: Window, rows: list[int], columns: list[int], norm_eps: float
) -> Tensor:
    part, heads = _Part(x, window, rows, columns, 1), w.temperature.shape[0]
    normal = channel_layer_norm(part.pixels, w.norm_weight, w.norm_bias, norm_eps)
    x_att, x_conv, _ = normal.chunk(3, 1)
    branch = x_att.shape[1]
    projected = part.padded(F.conv2d(x_att, w.qkv[: 2 * branch]), 1)
    q, k = F.conv2d(projected, w.qkv_dwconv[: 2 * branch], groups=2 * branch).double().chunk(2, 1)
    inputs = part.padded(x_conv, 0).double()

    def cell(down: slice, across: slice) -> Tensor:
        return _of_cell(*(t[:, :, down, across].flatten(2) for t in (q, k, inputs)), heads)

    return torch.stack([torch.stack([cell(i, j) for j in _steps(columns)], 1) for i in _steps(rows)], 1)


def _of_cell(q: Tensor, k: Tensor, inputs: Tensor, heads: int) -> Tensor:
    """All [B, c, pixels], float64."""
    by_head = [t.unflatten(1, (heads, -1)) for t in (q, k)]
    gram = by_head[0] @ by_head[1].mT
    return torch.cat((gram.flatten(1), q.square().sum(2), k.square().sum(2), inputs.sum(2)), 1)


def statistics(
    sums: Tensor, pixels: Tensor, w: MixerWeights, dtype: torch.dtype, bn_eps: float
) -> RegionStatistics:
    branch, heads = w.norm_weight.shape[0] // 3, w.temperature.shape[0]
    depth = branch // heads
    gram, q, k, total = sums.split((branch * depth, branch, branch, branch), 1)
    gram = gram.view(-1, heads, depth, depth)
    norms = [t.sqrt().view(-1, heads, depth) for t in (q, k)]
    cosines = gram / norms[0].clamp_min(1e-12).unsqueeze(3) / norms[1].clamp_min(1e-12).unsqueeze(2)
    attn = (cosines * w.temperature.double()).softmax(3)
    mean = (total / pixels.unsqueeze(1)).to(dtype)
    bn = BatchNorm(mean, w.bn_mean.to(dtype), w.bn_var.to(dtype))
    kernels = gated_branch.generate(w, bn, bn_eps).kernels
    return RegionStatistics(torch.cat((attn, gram, *(n.unsqueeze(2) for n in norms)), 2).to(dtype), kernels)


def apply(
    x: Tensor,
    w: MixerWeights,
    statistics: RegionStatistics,
    window: Window,
    rows: list[int],
    columns: list[int],
    norm_eps: float,
    bn_eps: float,
    out: Tensor,
) -> None:
    part = _Part(x, window, rows, columns, 3)
    normal = channel_layer_norm(part.pixels, w.norm_weight, w.norm_bias, norm_eps)
    x_att, x_conv, x_mlp = normal.chunk(3, 1)
    branch, hidden = x_att.shape[1], w.gic2.shape[1]
    v = F.conv2d(part.padded(F.conv2d(x_att, w.qkv[2 * branch :]), 1), w.qkv_dwconv[2 * branch :], groups=branch)

    scaled = F.batch_norm(x_conv.contiguous(), w.bn_mean, w.bn_var, w.bn_weight, w.bn_bias, False, 0.0, bn_eps)
    detail = part.padded(F.conv2d(scaled, w.gic1[2 * hidden - branch :]), 3)
    gate, identity = F.conv2d(part.padded(scaled, 0), w.gic1[: 2 * hidden - branch]).split((hidden, hidden - branch), 1)
    att, detail = _by_cell(v, detail, statistics, rows, columns)
    mixed = F.conv2d(F.gelu(gate / w.gate_temperature) * torch.cat((identity, detail), 1), w.gic2)
    conv = F.conv2d(mixed + part.padded(x_conv, 0), w.proj_out)

    x_mlp = part.padded(x_mlp, 0)
    mlp = F.conv1d(F.gelu(F.conv1d(x_mlp.flatten(2), w.mlp_in)), w.mlp_out).reshape(x_mlp.shape)
    fused = tri_branch_fusion(att, conv, mlp, w.alpha_att, w.alpha_conv, w.alpha_mlp)
    torch.add(part.padded(part.pixels, 0), F.conv2d(fused, w.project_out), out=out)


def _by_cell(
    v: Tensor, detail: Tensor, statistics: RegionStatistics, rows: list[int], columns: list[int]
) -> tuple[Tensor, Tensor]:
    """Attention times v [B, c, h, w], and the generated kernels on the detail [B, c, h + 6, w + 6], cell by cell."""
    att, convolved = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(v)
    batch, branch, heads, depth = *v.shape[:2], statistics.attention.shape[3], statistics.attention.shape[5]
    matrices = statistics.attention[:, :, :, :, :depth].to(accumulator(v.dtype))
    for i, down in enumerate(_steps(rows)):
        for j, across in enumerate(_steps(columns)):
            values = v[:, :, down, across]
            shape = values.shape
            product = matrices[:, i, j].to(v.dtype) @ values.reshape(batch, heads, depth, -1)
            att[:, :, down, across] = product.reshape(shape)
            around = detail[:, :, down.start : down.stop + 6, across.start : across.stop + 6]
            kernels = statistics.kernels[:, i, j].to(v.dtype).reshape(batch * branch, 1, 7, 7)
            planes = around.reshape(1, batch * branch, *around.shape[2:])
            convolved[:, :, down, across] = F.conv2d(planes, kernels, groups=batch * branch).view(shape)
    return att, convolved


def feed_forward(
    x: Tensor, w: FeedForwardWeights, window: Window, rows: list[int], columns: list[int], form: Form, out: Tensor
) -> None:
    part = _Part(x, window, rows, columns, 1)
    left, _, top, _ = (1 - n for n in part.missing)
    # Its zero padding reaches one pixel deep, which is cut off wherever the map goes on.
    y = feed_forward_stage(part.pixels, *w, *form)
    out.copy_(y[:, :, top : top + out.shape[2], left : left + out.shape[3]])
