"""Training losses of MIRAGE (arXiv 2505.18679): L1, Fourier, and the contrast of the two SPD embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LossTerms", "MirageLoss", "fourier_loss", "l1_loss", "spd_contrastive_loss"]


def _same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape, got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of two tensors of the same shape (half precision is widened to fp32); a scalar.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(prediction, target)
    return F.l1_loss(_at_least_float32(prediction), _at_least_float32(target))


def fourier_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of the unnormalised ``rfft2`` over H and W.

    Args:
        prediction, target: ``[..., H, W]`` of the same shape; half precision is widened to fp32.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(prediction, target)
    found, wanted = (torch.view_as_real(torch.fft.rfft2(_at_least_float32(x))) for x in (prediction, target))
    return F.l1_loss(found, wanted)


def spd_contrastive_loss(z_s: Tensor, z_l: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE between shallow and latent embeddings: cross-entropy of ``z_s z_l^T / temperature`` against the diagonal.

    Args:
        z_s, z_l: ``[B, D]``, L2-normalised; half precision is widened to fp32, also under autocast. With B = 1 there is
            nothing to contrast with and the loss is 0.
        temperature: positive.

    Raises:
        ValueError: the embeddings are not two matrices of one shape, or the temperature is not positive.
    """
    if z_s.ndim != 2 or z_s.shape != z_l.shape:
        raise ValueError(f"z_s and z_l must both be [B, D], got {tuple(z_s.shape)} and {tuple(z_l.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with torch.autocast(z_s.device.type, enabled=False):
        logits = _at_least_float32(z_s) @ _at_least_float32(z_l).T / temperature
        return F.cross_entropy(logits, torch.arange(z_s.shape[0], device=z_s.device))


class LossTerms(NamedTuple):
    """The terms of `MirageLoss` before they are weighted, scalars attached to the autograd graph."""

    l1: Tensor
    fourier: Tensor
    contrastive: Tensor


class MirageLoss(nn.Module):
    """``L1 + fourier_weight * Fourier + contrastive_weight * InfoNCE``.

    Args:
        preset: ``"paper"`` weighs the contrastive term 0.05, ``"released"`` (the authors' code) 0.01; both weigh the
            Fourier term 0.1 and use a contrastive temperature of 0.1.
        fourier_weight, contrastive_weight, temperature: override the preset's value.

    Raises:
        ValueError: an unknown preset.
    """

    PRESETS = {
        "paper": {"fourier_weight": 0.1, "contrastive_weight": 0.05, "temperature": 0.1},
        "released": {"fourier_weight": 0.1, "contrastive_weight": 0.01, "temperature": 0.1},
    }

    def __init__(
        self,
        preset: str = "paper",
        *,
        fourier_weight: float | None = None,
        contrastive_weight: float | None = None,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        if preset not in self.PRESETS:
            raise ValueError(f"preset must be one of {sorted(self.PRESETS)}, got {preset!r}")
        values = self.PRESETS[preset]
        self.preset = preset
        self.fourier_weight = values["fourier_weight"] if fourier_weight is None else fourier_weight
        self.contrastive_weight = values["contrastive_weight"] if contrastive_weight is None else contrastive_weight
        self.temperature = values["temperature"] if temperature is None else temperature

    def forward(
        self, prediction: Tensor | tuple[Tensor, tuple[Tensor, Tensor]], target: Tensor
    ) -> tuple[Tensor, LossTerms]:
        """Return the weighted total and the unweighted terms.

        Args:
            prediction: what ``model(x, return_spd=True)`` returns; the restored images alone where
                ``contrastive_weight`` is 0.
            target: the clean images, ``[B, C, H, W]``.

        Raises:
            ValueError: the shapes differ, or the contrastive term is wanted and the embeddings are not there.
        """
        restored, embeddings = (prediction, None) if isinstance(prediction, Tensor) else prediction
        if embeddings is None and self.contrastive_weight != 0:
            raise ValueError(
                f"contrastive_weight is {self.contrastive_weight}, so prediction must be (restored, (z_s, z_l)): "
                "call the model with return_spd=True"
            )
        l1 = l1_loss(restored, target)
        fourier = fourier_loss(restored, target)
        contrastive = l1.new_zeros(()) if embeddings is None else spd_contrastive_loss(*embeddings, self.temperature)
        total = l1 + self.fourier_weight * fourier + self.contrastive_weight * contrastive
        return total, LossTerms(l1, fourier, contrastive)

    def extra_repr(self) -> str:
        return (
            f"preset={self.preset!r}, fourier_weight={self.fourier_weight}, "
            f"contrastive_weight={self.contrastive_weight}, temperature={self.temperature}"
        )
