"""CLIP's image tower for weights that a user has: DA-CLIP's controller, whose embedding is of the degradation.

DA-CLIP (ICLR 2024) trains a copy of CLIP's image tower, the controller, beside it. What the controller adds to CLIP's
own tower is not needed here, so the tower alone is built, of PyTorch's own encoder layers, and read under its names
there (``visual_control.*``). Its sizes follow from the weights: ViT-B/32 has 87,849,216 parameters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage.checkpoint.errors import CheckpointError
from mirage.unirestorer.extractors import View, check_view, embed_views, fingerprint_of

__all__ = ["CLIPExtractor"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

HEAD = 64  # features of an attention head, in all of CLIP's transformers

PREFIX = "visual_control."

BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn": "self_attn",
    "mlp.c_fc": "linear1",
    "mlp.c_proj": "linear2",
}
"""A block's parts by CLIP's names and by those of `torch.nn.TransformerEncoderLayer`."""


class CLIPExtractor(nn.Module):
    """A vision transformer as CLIP has it: patches, a class token, layer normalisation before attention, exact GELU.

    The embedding is the class token's, projected, and not normalised. The default sizes are ViT-B/32's.

    Args:
        width: features of a token, a multiple of 64.
        layers: blocks.
        heads: of attention; CLIP has one for each 64 features.
        patch: side of a patch, in pixels.
        size: side of what it sees, in pixels, a multiple of ``patch``.
        dim: of an embedding.
        view: see `mirage.unirestorer.views`; ``resize`` is what released weights saw. Images are enlarged to ``size``
            where they are smaller.

    Raises:
        ValueError: sizes do not go together, or the view is none.
    """

    def __init__(
        self, width: int = 768, layers: int = 12, heads: int | None = None, patch: int = 32, size: int = 224,
        dim: int = 512, *, view: View = "resize",
    ) -> None:  # fmt: skip
        super().__init__()
        check_view(view)
        heads = heads or max(1, width // HEAD)
        if size % patch or width % heads:
            raise ValueError(
                f"size, width: expected multiples of patch {patch} and heads {heads}, got {size} and {width}"
            )
        self.view, self.size = view, size
        self.config: dict[str, Any] = {"width": width, "layers": layers, "heads": heads, "patch": patch, "dim": dim}
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, dim))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.config["dim"])

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the class."""
        return {**self.config, "view": self.view, "size": self.size}

    @property
    def fingerprint(self) -> str:
        """See `Extractor`."""
        return fingerprint_of("clip", self.arguments, self.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images of the tower's size, ``[N, 3, size, size]`` in [0, 1], to ``[N, dim]``.

        Raises:
            ValueError: they have another size.
        """
        if list(images.shape[1:]) != [3, self.size, self.size]:
            raise ValueError(f"images: expected [N, 3, {self.size}, {self.size}], got {list(images.shape)}")
        mean: Any = self.mean
        x = self.conv1((images - mean) / self.std).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([token, x], 1) + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj

    def embed(self, images: Tensor) -> Tensor:
        """See `Extractor`.

        Raises:
            ValueError: the images are no ``[B, 3, H, W]``.
        """
        images = images.to(self.proj.device, self.proj.dtype)
        return embed_views(self, images, self.view, self.size, enlarge=True).float()

    @classmethod
    def from_weights(
        cls, path: str | os.PathLike[str], *, prefix: str = PREFIX, view: View = "resize", size: int | None = None
    ) -> CLIPExtractor:
        """The tower in a checkpoint, such as DA-CLIP's ``daclip_ViT-B-32.pt``; evaluation mode.

        Args:
            path: ``.safetensors``, or what ``torch.load`` reads, of weights alone; a state dict, or one under
                ``state_dict``.
            prefix: of the tower's names: ``"visual."`` for CLIP's own image tower. Names may have another prefix
                before it, such as ``module.``; blocks may lie at ``transformer.resblocks`` or at DA-CLIP's
                ``transformer.transformer.resblocks``.
            view: see the class.
            size: the tower's own, if it is given at all.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is damaged, has no such tower, or names are missing, left over, or of other shapes.
        """
        from mirage.checkpoint import read_content

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"weights: no file {str(path)!r}")
        content: Any = read_content(path)[0]
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        state = _translated(_below(content, prefix, path))
        try:
            sizes = _sizes(state)
            if size not in (None, sizes["size"]):
                raise ValueError(f"size: expected {sizes['size']}, as its positions are, got {size}")
            found = cls(**sizes, view=view)
            found.load_state_dict({name: value.float() for name, value in state.items()})
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: no image tower of CLIP under {prefix}: {error}") from error
        return found.eval()


def _below(content: Any, prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, or have it behind a dot, without it."""
    found = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        at = 0 if name.startswith(prefix) else name.find(f".{prefix}") + 1 or -1
        if at >= 0 and isinstance(value, Tensor):
            found[name[at + len(prefix) :]] = value
    if not found:
        names = ", ".join(list(content)[:4]) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: expected weights named {prefix}*, got {names}, ...")
    return found


def _translated(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of this module for CLIP's; what the controller gives to CLIP's own tower (``zero_modules``) is left out."""
    found = {}
    for name, value in tower.items():
        match = re.fullmatch(r"transformer\.(?:transformer\.)?resblocks\.(\d+)\.(attn|ln_1|ln_2|mlp\.\w+)\.(.+)", name)
        if match:
            found[f"blocks.{match[1]}.{BLOCK.get(match[2], match[2])}.{match[3]}"] = value
        elif "zero_modules" not in name:
            found[name] = value
    return found


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of the class, from shapes."""
    width, _, patch, _ = state["conv1.weight"].shape
    side = round((len(state["positional_embedding"]) - 1) ** 0.5)
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    return {"width": width, "layers": layers, "patch": patch, "size": side * patch, "dim": state["proj"].shape[1]}
