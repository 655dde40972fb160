"""What is timed: the operators at the shapes that MIRAGE-T gives them, each beside the PyTorch expression it replaces.

One set-up serves time and floors. Bytes and multiply-adds are the least that the operator's inputs and outputs
demand; floors divide them by the copy bandwidth and the matrix rate that were measured on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mirage_kernels
from mirage import blocks
from mirage_kernels.channel_attention_fusion import reference as attention_fusion_reference
from mirage_kernels.dense_conv2d import reference as dense_conv_reference
from mirage_kernels.dynamic_depthwise_conv2d import reference as dynamic_conv_reference
from mirage_kernels.gated_depthwise_ffn import reference as ffn_reference
from mirage_kernels.spd_covariance import reference as covariance_reference


@dataclass(frozen=True)
class Workload:
    """One operator at one shape.

    Attributes:
        operator: name of the public function.
        shape: [B, C, H, W] of its main tensor.
        make: the tensor arguments, in float32, on the CPU.
        public, expression: the operator, and the PyTorch expression that it replaces.
        bytes_forward, bytes_both: least traffic of forward, and of forward and backward, in float32.
        macs_forward: multiply-adds of forward; backward has twice as many.
        implementations: those of its own that the operator has.
    """

    operator: str
    shape: tuple[int, ...]
    make: Callable[[], list[Tensor]]
    public: Callable[..., Tensor]
    expression: Callable[..., Tensor]
    bytes_forward: int
    bytes_both: int
    macs_forward: int
    implementations: tuple[str, ...] = ("cpp", "triton")

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    def floor(self, both: bool, copy_bytes_per_s: float, macs_per_s: float) -> float:
        """Seconds below which no implementation can be: the larger of the time for the bytes and for the products."""
        moved = self.bytes_both if both else self.bytes_forward
        macs = self.macs_forward * (3 if both else 1)
        return max(moved / copy_bytes_per_s, macs / macs_per_s)


def _levels(size: int) -> list[tuple[int, int, int]]:
    """(dim, heads, side) of every kind of block of MIRAGE-T for an image of size x size."""
    return [
        (24, 1, size),
        (48, 1, size),
        (48, 2, size // 2),
        (96, 4, size // 4),
        (192, 8, size // 8),
    ]


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _layer_norm(dim: int, side: int) -> Workload:
    module = blocks.LayerNorm(dim)

    def expression(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"body.weight": weight, "body.bias": bias}, (x,))

    unit = 4 * dim * side * side
    shape = (1, dim, side, side)
    return Workload(
        "channel_layer_norm",
        shape,
        lambda: [_randn(*shape), _randn(dim), _randn(dim)],
        mirage_kernels.channel_layer_norm,
        expression,
        bytes_forward=2 * unit,
        bytes_both=5 * unit,
        macs_forward=0,
    )


def _ffn(dim: int, side: int) -> Workload:
    shape = (1, 4 * dim, side, side)
    half = 4 * 2 * dim * side * side
    return Workload(
        "gated_depthwise_ffn",
        shape,
        lambda: [_randn(*shape), _randn(4 * dim, 1, 3, 3) / 3],
        mirage_kernels.gated_depthwise_ffn,
        ffn_reference,
        bytes_forward=3 * half,
        bytes_both=8 * half,
        macs_forward=9 * 4 * dim * side * side,
    )


def _feed_forward_stage(dim: int, side: int) -> Workload:
    norm, ffn = blocks.LayerNorm(dim), blocks.FeedForward(dim)

    def expression(x: Tensor, *weights: Tensor) -> Tensor:
        norm_weights = dict(zip(("body.weight", "body.bias"), weights[:2], strict=True))
        ffn_weights = dict(zip((name for name, _ in ffn.named_parameters()), weights[2:], strict=True))
        normed = torch.func.functional_call(norm, norm_weights, (x,))
        return x + torch.func.functional_call(ffn, ffn_weights, (normed,))

    unit = 4 * dim * side * side
    shape = (1, dim, side, side)
    return Workload(
        "feed_forward_stage",
        shape,
        lambda: [_randn(*shape), *(p.detach() for m in (norm, ffn) for p in m.parameters())],
        mirage_kernels.feed_forward_stage,
        expression,
        bytes_forward=2 * unit,
        bytes_both=5 * unit,  # backward reads x and the gradient of y, and writes that of x
        macs_forward=(6 * dim * dim + 36 * dim) * side * side,
    )


def _dynamic_conv(dim: int, side: int) -> Workload:
    channels = dim // 3
    shape = (1, channels, side, side)
    unit = 4 * channels * side * side
    return Workload(
        "dynamic_depthwise_conv2d",
        shape,
        lambda: [_randn(*shape), _randn(1, channels, 7, 7) / 7],
        mirage_kernels.dynamic_depthwise_conv2d,
        dynamic_conv_reference,
        bytes_forward=2 * unit,
        bytes_both=5 * unit,
        macs_forward=49 * channels * side * side,
    )


def _dense_conv(channels: int, outputs: int, side: int) -> Workload:
    shape = (1, channels, side, side)
    pixels, weights = side * side, 9 * channels * outputs
    return Workload(
        "dense_conv2d",
        shape,
        lambda: [_randn(*shape), _randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5],
        mirage_kernels.dense_conv2d,
        dense_conv_reference,
        bytes_forward=4 * ((channels + outputs) * pixels + weights),
        # backward reads x, grad_y and the weight, and writes two gradients
        bytes_both=4 * ((3 * channels + 2 * outputs) * pixels + 3 * weights),
        macs_forward=weights * pixels,
        implementations=("cpp",),
    )


def _dense_convs(size: int) -> list[Workload]:
    """Embedding, output, the first downsampling and the upsamplings; the other downsamplings take the same inputs."""
    places = [(3, 24, 1), (48, 3, 1), (24, 12, 1), (48, 96, 2), (96, 192, 4), (96, 192, 8)]
    return [_dense_conv(channels, outputs, size // scale) for channels, outputs, scale in places]


def _attention_fusion(dim: int, heads: int, side: int) -> Workload:
    channels = dim // 3
    shape = (1, channels, side, side)
    unit = 4 * channels * side * side

    def run(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, conv: Tensor, mlp: Tensor, *scalars: Tensor) -> Tensor:
            temperature, *alphas = scalars
            return function(q, k, v, temperature, heads, conv, mlp, *alphas)

        return call

    return Workload(
        "channel_attention_fusion",
        shape,
        lambda: [*(_randn(*shape) for _ in range(5)), torch.ones(heads, 1, 1), *(torch.ones(1) for _ in range(3))],
        run(mirage_kernels.channel_attention_fusion),
        run(attention_fusion_reference),
        # q, k, v, conv, mlp in and three branches out; backward reads those five and three gradients, writes five
        bytes_forward=8 * unit,
        bytes_both=(8 + 13) * unit,
        macs_forward=2 * channels * channels // heads * side * side,
    )


def _covariance(batch: int, channels: int, side: int) -> Workload:
    shape = (batch, channels, side, side)
    unit = 4 * batch * channels * side * side
    return Workload(
        "spd_covariance",
        shape,
        lambda: [_randn(*shape)],
        mirage_kernels.spd_covariance,
        covariance_reference,
        bytes_forward=unit,
        bytes_both=3 * unit,
        macs_forward=batch * channels * channels * side * side,
    )


def operator_workloads(size: int) -> list[Workload]:
    """Every operator at every shape of MIRAGE-T for an image of size x size."""
    found = []
    for dim, heads, side in _levels(size):
        found += [_layer_norm(dim, side), _ffn(dim, side), _attention_fusion(dim, heads, side)]
        found += [_dynamic_conv(dim, side), _feed_forward_stage(dim, side)]
    return [*found, *_dense_convs(size), _covariance(1, 12, size), _covariance(1, 24, size // 8)]
