"""Tensors without memory, shaped as in the networks, on which tools/compile_triton.py compiles Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (channels, side) of the feature maps at 224 x 224 pixels: encoder levels 1 to 3, latent, and the last decoder level.
MIRAGE_T = ((24, 224), (48, 112), (96, 56), (192, 28), (48, 224))
MIRAGE_S = ((30, 224), (60, 112), (120, 56), (240, 28), (60, 224))
HEADS = dict(zip(MIRAGE_T + MIRAGE_S, 2 * (1, 2, 4, 8, 1), strict=True)) | {(96, 224): 4, (192, 64): 8}
"""Heads of the blocks on these maps, and on two of larger images."""


def meta(*shape: int, dtype: torch.dtype = torch.float32, wide: bool = False) -> Tensor:
    """A contiguous tensor on the meta device; `wide` puts its channels 2^31 elements apart (64-bit offsets)."""
    t = torch.empty(shape, dtype=dtype, device="meta")
    if not wide:
        return t
    strides = list(t.stride())
    strides[1] = 2**31
    strides[0] = shape[1] * 2**31
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def variants() -> Iterator[tuple[str, tuple[int, int], torch.dtype, bool]]:
    """(label, (channels, side), dtype, wide): every width of both networks in float32; the widest of each in the
    16-bit dtypes and with 64-bit offsets, where registers are scarcest."""
    for stages in (MIRAGE_T, MIRAGE_S):
        for stage in stages[:4]:
            yield _label(stage, torch.float32), stage, torch.float32, False
        for dtype in DTYPES[1:]:
            yield _label(stages[3], dtype), stages[3], dtype, False
    yield _label(MIRAGE_S[3], torch.float32) + " int64", MIRAGE_S[3], torch.float32, True


def stage_variants() -> Iterator[tuple[str, tuple[int, int], torch.dtype, bool]]:
    """Every width of both networks, and levels of larger images, in each dtype; one with 64-bit offsets."""
    for stage in HEADS:
        for dtype in DTYPES:
            yield _label(stage, dtype), stage, dtype, False
    yield _label(MIRAGE_T[2], torch.float32) + " int64", MIRAGE_T[2], torch.float32, True


def _label(stage: tuple[int, int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} C={stage[0]} {stage[1]}x{stage[1]}"
