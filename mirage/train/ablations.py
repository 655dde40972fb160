"""The ablations of the paper's Tables 7 and C as switches, and our parameter counts beside the printed ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirage.blocks import DYNAMIC_KERNEL_SIZE, Attention, GatedCNNBlock, TransformerBlock, check_divisible
from mirage.model import MIRAGE, mirage_tiny
from mirage.train.config import ConfigError

__all__ = ["ABLATIONS", "Ablation", "PartialMixer", "ablate", "find_ablation", "parameter_table"]

BRANCHES = ("att", "conv", "mlp")


@dataclass(frozen=True)
class Ablation:
    """A row of Tables 7 and C.

    Attributes:
        name: the value of ``model.ablation``; empty: nothing is left out.
        row: what the paper calls it.
        printed: parameters in the paper, in millions.
        psnr, ssim: of the paper, averages of three degradations.
        branches: of the mixer that are left; the channels are split evenly among them.
        dynamic: whether the 7x7 kernels are generated; else they are learned, one for all samples, as with the flag
            ``dynamic_conv=False`` of the released code.
        fusion: whether branches modulate each other; else they are concatenated.
        spd: whether there are embeddings and a contrastive term.
        euclidean: the embeddings are of the features' means, not of their covariances.
        fourier: whether there is a Fourier term.
        note: where the printed number of parameters cannot be that of the network described.
    """

    name: str
    row: str
    printed: float
    psnr: float
    ssim: float
    branches: tuple[str, ...] = BRANCHES
    dynamic: bool = True
    fusion: bool = True
    spd: bool = True
    euclidean: bool = False
    fourier: bool = True
    note: str = ""


FULL = Ablation("", "MIRAGE-T (full)", 6.21, 32.77, 0.919)

ABLATIONS = {
    a.name: a
    for a in (
        Ablation(
            "att_only", "att-only", 19.89, 32.23, 0.912, branches=("att",), fusion=False,
            note="printed: three times the full model, though attention over C channels has fewer weights than "
            "three branches of C/3 (the kernel generator alone has 49 (C/3)^2)",
        ),
        Ablation(
            "no_dynamic_conv", "w/o DynamicConv", 9.43, 32.21, 0.911, dynamic=False,
            note="printed: larger than the full model, though generating the kernels takes a third of its weights",
        ),
        Ablation(
            "no_mlp", "w/o C-MLP", 7.01, 32.39, 0.913, branches=("att", "conv"),
            note="printed: 7.01; with the channels split in two, the convolution branch has C/2 and more weights; "
            "9.43, which is near, stands in the row of DynamicConv",
        ),
        Ablation(
            "no_fusion", "w/o fusion (concatenation only)", 5.71, 32.57, 0.914, fusion=False,
            note="printed: 0.50 M fewer than the full model, though the fusion has three weights a block",
        ),
        Ablation(
            "no_contrast", "w/o CL & SPD", 5.80, 32.63, 0.916, spd=False,
            note="printed: 0.41 M fewer than the full model, though the SPD head has 0.05 M",
        ),
        Ablation(
            "euclidean", "w/o SPD (CL Euclidean)", 6.10, 32.53, 0.914, euclidean=True,
            note="printed: 0.11 M fewer than the full model, though the whole SPD head has 0.05 M",
        ),
        Ablation(
            "no_fourier", "w/o Fourier loss", 5.80, 32.70, 0.917, fourier=False,
            note="printed: 0.41 M fewer than the full model, though a loss has no weights",
        ),
    )
}  # fmt: skip


def find_ablation(name: str | None) -> Ablation:
    """The ablation of that name; the full network for None.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if not name:
        return FULL
    if name not in ABLATIONS:
        near = difflib.get_close_matches(name, ABLATIONS, 1, cutoff=0)[0]
        known = ", ".join(ABLATIONS)
        raise ConfigError(f"model.ablation: expected one of {known}, got {name!r}; the nearest is {near!r}")
    return ABLATIONS[name]


class PartialMixer(nn.Module):
    """`mirage.blocks.Attention` with some of its branches, names and initial distribution of the weights unchanged.

    Args:
        dim: number of channels C, a multiple of ``len(branches) * num_heads``.
        num_heads: of the channel attention.
        drop_path: of the gated CNN.
        branches: of ``"att"``, ``"conv"`` and ``"mlp"``; each gets ``C / len(branches)`` channels.
        fusion: each branch is modulated by the sigmoid of the others' sum; else they are concatenated.
    """

    def __init__(
        self, dim: int, num_heads: int, drop_path: float, branches: Sequence[str] = BRANCHES, fusion: bool = True
    ) -> None:
        super().__init__()
        check_divisible("dim", dim, len(branches) * num_heads, f"{len(branches)} branches of num_heads heads each")
        c = dim // len(branches)
        self.branches, self.num_heads = tuple(branches), num_heads
        names = {"att": "alpha_att", "conv": "alpha_gated", "mlp": "alpha_mlp"}
        self.alphas = [names[branch] for branch in branches] if fusion and len(branches) > 1 else []
        if "att" in branches:
            self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        for name in self.alphas:
            setattr(self, name, nn.Parameter(torch.ones(1)))
        if "att" in branches:
            self.qkv = nn.Conv2d(c, 3 * c, 1, bias=False)
            self.qkv_dwconv = nn.Conv2d(3 * c, 3 * c, 3, padding=1, groups=3 * c, bias=False)
        if "conv" in branches:
            self.gatedcnn = GatedCNNBlock(c, drop_path)
        if "mlp" in branches:
            self.mlp = nn.Sequential(nn.Conv1d(c, 2 * c, 1, bias=False), nn.GELU(), nn.Conv1d(2 * c, c, 1, bias=False))
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        run: dict[str, Any] = {
            "att": lambda part: Attention.channel_attention(self, part),  # type: ignore[arg-type]
            "conv": lambda part: self.gatedcnn(part),
            "mlp": lambda part: self.mlp(part.flatten(2)).reshape(part.shape),
        }
        parts = x.chunk(len(self.branches), dim=1)
        found = [run[branch](part) for branch, part in zip(self.branches, parts, strict=True)]
        if self.alphas:
            gates = [torch.sigmoid(sum(other for other in found if other is not one)) for one in found]
            alphas = [getattr(self, name) for name in self.alphas]
            found = [one + alpha * gate for one, alpha, gate in zip(found, alphas, gates, strict=True)]
        return self.project_out(torch.cat(found, dim=1))


class StaticGatedCNNBlock(GatedCNNBlock):
    """`mirage.blocks.GatedCNNBlock` with one learned depthwise 7x7 kernel for all samples, called ``cconv``."""

    def __init__(self, dim: int, drop_path: float = 0.1) -> None:
        super().__init__(dim, drop_path)
        del self.kernel_generator
        size = DYNAMIC_KERNEL_SIZE
        self.cconv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=False)

    def dynamic_conv(self, x: Tensor) -> Tensor:
        return self.cconv(x)


class _MeanHead(nn.Module):
    """In the place of a covariance: the mean of each channel, ``[B, C, H, W]`` to ``[B, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


def ablate(network: nn.Module, ablation: Ablation) -> nn.Module:
    """Leave out of a `MIRAGE`, in place, what the ablation leaves out of the network, and return it.

    What was replaced has new weights. A network without SPD head is built without one: ``mirage_tiny(spd=False)``.
    """
    for block in _blocks(network):
        heads, dim = block.attn.num_heads, block.norm1.body.weight.numel()
        rate = getattr(block.attn.gatedcnn.drop_path, "drop_prob", 0.0)
        if not ablation.dynamic:
            block.attn.gatedcnn = StaticGatedCNNBlock(dim // len(BRANCHES), rate)
        if ablation.branches != BRANCHES or not ablation.fusion:
            block.attn = PartialMixer(dim, heads, rate, ablation.branches, ablation.fusion)  # type: ignore[assignment]
    if ablation.euclidean and isinstance(network, MIRAGE):
        if not network.config["spd"]:
            raise ConfigError("model.ablation: euclidean needs model.spd=true")
        features = network.config["spd_features"]
        network.spd_covariance = _MeanHead()  # type: ignore[assignment]
        network.spd_proj_shallow = nn.Linear(network.reduce_shallow.out_channels, features)
        network.spd_proj_latent = nn.Linear(network.reduce_latent.out_channels, features)
    return network


def _blocks(network: nn.Module) -> Iterator[TransformerBlock]:
    return (module for module in network.modules() if isinstance(module, TransformerBlock))


def parameter_table() -> list[tuple[Ablation, int]]:
    """Every row of Tables 7 and C with the number of parameters of our MIRAGE-T so ablated."""
    rows = []
    with torch.device("meta"):
        for ablation in (*ABLATIONS.values(), FULL):
            network = ablate(mirage_tiny(spd=ablation.spd), ablation)
            rows.append((ablation, sum(p.numel() for p in network.parameters())))
    return rows
