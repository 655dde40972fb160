"""What MoCE-IR's decoder chooses among, in less memory where no gradient is wanted: the adapter of its blocks, and the
experts' convolution of queries with keys in the Fourier domain.

Both call their children as modules. What they leave out are feature maps between: spectra of all channels at a time,
and a stack, a product and a sum of maps where one expert is chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirage.fast.modules import convolve_in_parts
from mirage.fast.recognise.pattern import ORIGINAL_CLASS, is_plain_inference

__all__ = ["ExpertAdapter", "FourierAttention"]

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
        weights = next(self.norm.parameters(), mixed)
        mixed = self.norm(mixed.to(weights.dtype))
        mixed = mixed * v
        del v
        return self.proj_out(mixed)


class ExpertAdapter(nn.Module):
    """MoCE-IR's adapter. For one image in eval mode without gradients: the experts that the routing chose, times their
    gates, summed and projected. Elsewhere what its own class does."""

    routing: nn.Module
    experts: nn.ModuleList
    proj_out: nn.Module
    loss: Any

    def forward(self, x: Tensor, freq_emb: Tensor, shared: Tensor) -> Tensor:
        if self.training or x.shape[0] != 1 or not is_plain_inference():
            original: Any = vars(self)[ORIGINAL_CLASS]
            result: Tensor = original.forward(self, x, freq_emb, shared)
            return result
        gates, chosen, _, self.loss = self.routing(x, freq_emb)
        gates = gates.gather(1, chosen)[0]
        first, *others = (self.experts[i] for i in chosen[0])
        mixed = first(x, shared) * gates[0]
        for expert, gate in zip(others, gates[1:], strict=True):
            mixed += expert(x, shared) * gate
        return self.proj_out(mixed)


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
