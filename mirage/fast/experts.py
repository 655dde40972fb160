"""The first half of the block of MoCE-IR's decoder, and what it chooses among, in less memory where no gradient is
wanted: the adapter of its blocks, the experts, and their convolution of queries with keys in the Fourier domain.

They call their children as modules. What they leave out are feature maps between: spectra of all channels at a time,
and a stack, a product and a sum of maps where one expert is chosen. Of large images the maps between the block's input,
its attention and its result do not exist at all, see `mirage.fast.strips`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mirage.fast import strips
from mirage.fast.modules import (
    BiasFreeLayerNorm,
    ChannelAttention,
    CrossChannelAttention,
    LayerNorm,
    are_of,
    convolve_in_parts,
    convolved_of,
    cross_attention,
    is_square,
    pointwise_of,
    self_attention,
)
from mirage.fast.recognise.pattern import ORIGINAL_CLASS, is_bypassable, is_plain_inference
from mirage.fast.strips import Strips
from mirage_kernels import workspace

__all__ = ["Expert", "ExpertAdapter", "ExpertSequence", "FourierAttention"]

SPECTRA_BYTES = 4 << 20
"""Of the maps of those channels whose spectra are held at a time."""


class FourierAttention(nn.Module):
    """An expert's body in MoCE-IR: queries of x, convolved with the keys in squares of `patch_size` pixels, circularly;
    the norm over channels of that, times the values."""

    patch_size: int
    q: nn.Module
    q_dwconv: nn.Module
    kv: nn.Module
    kv_dwconv: nn.Module
    norm: nn.Module
    proj_out: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        (q,) = convolve_in_parts(self.q, self.q_dwconv, x, 1)
        k, v = convolve_in_parts(self.kv, self.kv_dwconv, x, 2)
        mixed = convolve_patches(q, k, self.patch_size)
        del q, k
        mixed = _normed(self, mixed)
        mixed = mixed * v
        del v
        return self.proj_out(mixed)


def _normed(body: Any, mixed: Tensor) -> Tensor:
    weights = next(body.norm.parameters(), mixed)
    return body.norm(mixed.to(weights.dtype))


class Expert(nn.Module):
    """An expert of MoCE-IR: between two projections its body, times a gate of what its block's attention made of the
    image; and its input. How often its own class repeats that is without consequence: each time begins with the input
    again."""

    proj: nn.ModuleList
    body: nn.Module

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        if x.shape[0] == 0:  # of a batch that chose others: its parameters have no gradient then
            return x
        mixed = self.body(self.proj[0](x))
        mixed = mixed * nn.functional.silu(self.proj[1](shared))
        return self.proj[2](mixed) + x


class ExpertSequence(nn.Sequential):
    """The sequence of one expert in which MoCE-IR has it: it takes two maps."""

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:  # type: ignore[override]
        (expert,) = self
        return expert(x, shared)


class ExpertAdapter(nn.Module):
    """MoCE-IR's adapter. For one image in eval mode without gradients: the experts that the routing chose, times their
    gates, summed and projected. Elsewhere what its own class does."""

    routing: nn.Module
    experts: nn.ModuleList
    proj_out: nn.Module
    loss: Any

    def forward(self, x: Tensor, freq_emb: Tensor, shared: Tensor) -> Tensor:
        if not _is_for_one_image(self, x):
            original: Any = vars(self)[ORIGINAL_CLASS]
            result: Tensor = original.forward(self, x, freq_emb, shared)
            return result
        experts, gates = _route(self, x, freq_emb)
        return self.proj_out(_sum(gates, (expert(x, shared) for expert in experts)))


def _is_for_one_image(adapter: nn.Module, x: Tensor) -> bool:
    return not adapter.training and x.shape[0] == 1 and is_plain_inference()


def _route(adapter: ExpertAdapter, x: Tensor, freq_emb: Tensor | None) -> tuple[list[Any], Tensor]:
    """The experts of an image and their gates."""
    gates, chosen, _, adapter.loss = adapter.routing(x, freq_emb)
    return [adapter.experts[i] for i in chosen[0]], gates.gather(1, chosen)[0]


def _sum(gates: Tensor, maps: Iterator[Tensor]) -> Tensor:
    """Of maps times their gates, none of which is kept for longer."""
    mixed = next(maps) * gates[0]
    for gate in gates[1:]:
        mixed += next(maps) * gate
    return mixed


# ---- large images --------------------------------------------------------------------------------------------------


def decode_in_strips(block: Any, x: Tensor, freq_emb: Tensor | None) -> Tensor | None:
    """The first half of the decoder's block of one large image, with two maps beside x: what its attention makes of the
    image, and the result. None where it is to run as it is, or where a module of another kind has to be called."""
    if not strips.are_wanted(x) or not _is_for_one_image(block.adapter, x) or not _are_known(block, x):
        return None
    shared_weights, mixer_weights = self_attention(block.shared, x), cross_attention(block.mixer, x)
    of_image, of_experts = map(pointwise_of, block.proj)
    if shared_weights is None or mixer_weights is None:
        return None
    if not is_square(of_image, x.shape[1]) or not is_square(of_experts, x.shape[1]):
        return None
    normed = Strips.of(x).then(block.norms[0])
    shared = strips.attend(shared_weights.behind(of_image), normed, normed, workspace.empty_like(x))
    mixed = _adapt(block.adapter, normed.then(of_experts), freq_emb, shared)
    strips.attend(mixer_weights, Strips.of(mixed), Strips.of(shared), mixed)
    return mixed.add_(x)


def _are_known(block: Any, x: Tensor) -> bool:
    """Whether the block's children are those that can run in strips of maps like x, and nobody sees their calls."""
    return (
        _is_local(block.norms[0])
        and type(block.shared) is ChannelAttention
        and type(block.adapter) is ExpertAdapter
        and type(block.mixer) is CrossChannelAttention
        and all(map(is_bypassable, (block.norms, block.proj, block.shared, block.adapter, block.mixer)))
        and is_square(pointwise_of(block.adapter.proj_out), x.shape[1])
        and all(map(_is_known_expert, block.adapter.experts))
        and are_of(x.dtype, block)
    )


def _is_local(norm: Any) -> bool:
    """Whether it is a norm of each pixel."""
    return type(norm) in (LayerNorm, BiasFreeLayerNorm) and is_bypassable(norm) and is_bypassable(norm.body)


def _is_known_expert(sequence: Any) -> bool:
    if type(sequence) is not ExpertSequence or not is_bypassable(sequence):
        return False
    (expert,) = sequence
    if type(expert) is not Expert or type(expert.body) is not FourierAttention:
        return False
    body = expert.body
    if not all(map(is_bypassable, (expert, expert.proj, body))) or not _is_local(body.norm):
        return False
    parts = convolved_of(body.q, body.q_dwconv, 1), convolved_of(body.kv, body.kv_dwconv, 2)
    return all(parts) and None not in map(pointwise_of, (*expert.proj, body.proj_out))


def _adapt(adapter: ExpertAdapter, of_experts: Strips, freq_emb: Tensor | None, shared: Tensor) -> Tensor:
    """What the adapter makes of a map of the shape of `shared`."""
    sequences, gates = _route(adapter, strips.whole(of_experts, shared), freq_emb)
    experts = [expert for (expert,) in sequences]
    parts = [_expert_in_strips(expert, of_experts, Strips.of(shared)) for expert in experts]
    mixed = workspace.empty_like(shared)
    for first, stop in strips.cut(shared, math.lcm(*(expert.body.patch_size for expert in experts))):
        mixed[:, :, first:stop] = adapter.proj_out(_sum(gates, (part.lines(first, stop) for part in parts)))
    return mixed


def _expert_in_strips(expert: Expert, x: Strips, shared: Strips) -> Strips:
    """Its result, in strips that begin with squares of its body."""
    body: Any = expert.body
    gate = shared.then(expert.proj[1])
    of_x = [*convolved_of(body.q, body.q_dwconv, 1), *convolved_of(body.kv, body.kv_dwconv, 2)]

    def lines(first: int, stop: int) -> Tensor:
        here = x.around(first, stop, strips.halo_of(of_x))
        q, k, v = strips.convolve(here.then(expert.proj[0]), of_x, first, stop)
        mixed = body.proj_out(_normed(body, convolve_patches(q, k, body.patch_size)) * v)
        mixed = mixed * nn.functional.silu(gate.lines(first, stop))
        return expert.proj[2](mixed) + here.lines(first, stop)

    return Strips(x.height, lines)


def convolve_patches(q: Tensor, k: Tensor, size: int) -> Tensor:
    """Circular convolution of every channel of q with that of k, in squares of `size` x `size` pixels from the upper
    left corner on; beyond the edges both are zero.

    Args:
        q, k: [B, C, H, W], floating point.

    Returns:
        [B, C, H, W], float32, in which it is computed.
    """
    per_channel = q[:, :1].nbytes if is_plain_inference() else 0
    together = max(SPECTRA_BYTES // per_channel, 1) if per_channel else q.shape[1]
    if together >= q.shape[1]:
        return _convolve_patches(q, k, size)
    mixed = q.new_empty(q.shape, dtype=torch.float32)
    for first in range(0, q.shape[1], together):
        channels = slice(first, first + together)
        mixed[:, channels] = _convolve_patches(q[:, channels], k[:, channels], size)
    return mixed


def _convolve_patches(q: Tensor, k: Tensor, size: int) -> Tensor:
    height, width = q.shape[2:]
    spectra = [torch.fft.rfft2(_squares(t.float(), size)) for t in (q, k)]
    squares = torch.fft.irfft2(spectra[0] * spectra[1], s=(size, size))
    return squares.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def _squares(x: Tensor, size: int) -> Tensor:
    """[B, C, rows, columns, size, size], with zeros beyond the edges."""
    padded = nn.functional.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size))
    return padded.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4)
