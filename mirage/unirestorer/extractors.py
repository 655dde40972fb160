"""What turns an image into an embedding of its degradation: the protocol, what extractors see of an image, and how they
are named.

UniRestorer (arXiv 2412.20157) fine-tunes DA-CLIP's image tower. Here an extractor is anything with ``embed``: the
package has a small convolutional network (`SmallExtractor`), the tower for weights that a user has (`CLIPExtractor`),
and GRIDS' descriptor (`GridsExtractor`). Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage.whole_files import safetensors_bytes, write_whole

__all__ = ["DEFAULT_WEIGHTS", "VIEWS", "Extractor", "View", "embed_views", "fingerprint_of", "load_extractor",
           "save_extractor", "views"]  # fmt: skip

DEFAULT_WEIGHTS = "extractor-small"
"""Name of the packaged weights."""

METADATA = "mirage_extractor"
FORMAT = 1

View = Literal["resize", "crops"]
VIEWS: tuple[str, ...] = get_args(View)
"""``resize``: the whole image, its shorter side made as long as the network's input, and the middle square of that, as
released weights see it. ``crops``: squares of the image as it is, whose embeddings are averaged; they keep noise."""


@runtime_checkable
class Extractor(Protocol):
    """An embedding of an image's degradation.

    Attributes:
        dim: length of an embedding.
        fingerprint: hexadecimal digest of what decides embeddings: weights and options.
    """

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def embed(self, images: Tensor, /) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1], H and W of any size, to ``[B, dim]``, float32, on the extractor's device."""
        ...


def load_extractor(
    name: str | os.PathLike[str] = DEFAULT_WEIGHTS, *, view: View | None = None, size: int | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:  # fmt: skip
    """The extractor of a file, or of packaged weights; nothing is downloaded.

    Args:
        name: a file that `save_extractor` wrote, or the name of packaged weights; ``clip:FILE`` for a tower under
            DA-CLIP's names; ``grids`` or ``grids:FILE`` for GRIDS' descriptor, with the packaged weights or an
            SRResNet's.
        view, size: what it sees of an image, see `views`; None: as it was saved, or what is usual for it.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such file, and no packaged weights of that name.
        CheckpointError, ValueError: the file is damaged, or of something else.
    """
    kind, colon, path = str(name).partition(":")
    options: dict[str, Any] = {key: value for key, value in {"view": view, "size": size}.items() if value is not None}
    if kind == "clip" and colon:
        from mirage.unirestorer.clip_tower import CLIPExtractor

        return CLIPExtractor.from_weights(path, **options).to(device)
    if kind == "grids" and (colon or not Path(kind).is_file()):
        from mirage.unirestorer.grids_extractor import GridsExtractor

        return GridsExtractor.from_weights(*([path] if colon else []), device=device, **options)
    return _load_saved(name, options, device)


def save_extractor(extractor: Extractor, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write an extractor of this package to a ``.safetensors`` file, whole or not at all.

    Args:
        dtype: of floating-point tensors there; None: as they are, so that the extractor that is loaded has the same
            fingerprint.

    Raises:
        ValueError: the name does not end in ``.safetensors``, the extractor is of another kind, or a weight does not
            fit ``dtype``.
        OSError: the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path: expected a name that ends in .safetensors, got {str(path)!r}")
    kind, arguments, state = _parts_of(extractor)
    tensors = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        tensors[name] = value.to(dtype) if value.is_floating_point() and dtype is not None else value
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{name}: holds values that are not finite as {tensors[name].dtype}")
    content = {"format": FORMAT, "kind": kind, "arguments": arguments}
    write_whole(path, safetensors_bytes(tensors, {"format": "pt", METADATA: json.dumps(content)}))


def _parts_of(extractor: Any) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    from mirage.unirestorer.clip_tower import CLIPExtractor
    from mirage.unirestorer.grids_extractor import GridsExtractor
    from mirage.unirestorer.small_extractor import SmallExtractor

    kinds: dict[type, str] = {SmallExtractor: "small", CLIPExtractor: "clip", GridsExtractor: "grids"}
    if type(extractor) not in kinds:
        names = ", ".join(cls.__name__ for cls in kinds)
        raise ValueError(f"extractor: expected one of {names}, got {type(extractor).__name__}")
    return kinds[type(extractor)], extractor.arguments, extractor.state_dict()


def _load_saved(name: str | os.PathLike[str], options: dict[str, Any], device: str | torch.device) -> Extractor:
    from safetensors import SafetensorError, safe_open

    from mirage.restore.loading import resolve_weights
    from mirage.unirestorer.clip_tower import CLIPExtractor
    from mirage.unirestorer.grids_extractor import GridsExtractor
    from mirage.unirestorer.small_extractor import SmallExtractor

    path = resolve_weights(name)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as an extractor's file: {error}") from error
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected an extractor's file of format {FORMAT}, got {content.get('format')}")
    makers: dict[str, Any] = {
        "small": SmallExtractor, "clip": CLIPExtractor, "grids": GridsExtractor.from_arguments
    }  # fmt: skip
    try:
        found = makers[content["kind"]](**{**content["arguments"], **options})
        found.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not readable as an extractor's file: {error}") from error
    return found.eval().to(device)


def check_view(view: str) -> None:
    """Refuse what is no view."""
    if view not in VIEWS:
        raise ValueError(f"view: expected {' or '.join(VIEWS)}, got {view!r}")


def views(images: Tensor, view: str, size: int, *, enlarge: bool = False) -> Tensor:
    """What an extractor sees of each image: ``[B, V, 3, h, w]``, sides at most ``size``.

    Args:
        images: ``[B, 3, H, W]``, floating point.
        view: ``resize``: V = 1, the shorter side made ``size`` long by bicubic interpolation with antialiasing (the
            kernel of Pillow and torchvision), and the middle ``size`` x ``size`` of that, in [0, 1]. ``crops``: the
            middle and the four corners, those that are the same once: V = 5 where both sides are longer than
            ``size``, 3 where one is, and 1 where none is.
        size: side of the network's input, in pixels.
        enlarge: of ``crops``: images with a side shorter than ``size`` are enlarged first; otherwise their crops are
            smaller than that.

    Raises:
        ValueError: the images have another shape, or the view is none.
    """
    check_view(view)
    if images.ndim != 4 or images.shape[1] != 3 or not all(images.shape[2:]) or not images.is_floating_point():
        raise ValueError(f"images: expected floating point [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    if view == "resize":
        return _middle(_resized(images, size), size)[:, None]
    if enlarge and min(images.shape[2:]) < size:
        images = _resized(images, size)
    spare = [max(0, side - size) for side in images.shape[2:]]
    corners = [(top, left) for top in (0, spare[0]) for left in (0, spare[1])]
    places = dict.fromkeys([(spare[0] // 2, spare[1] // 2), *corners])
    return torch.stack([images[:, :, top : top + size, left : left + size] for top, left in places], 1)


def _resized(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    shape = (size, max(size, size * width // height)) if height <= width else (max(size, size * height // width), size)
    if shape == (height, width):
        return images
    return F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def _middle(images: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


@torch.no_grad()
def embed_views(
    describe: Callable[[Tensor], Tensor], images: Tensor, view: str, size: int, *, enlarge: bool = False,
    batch: int = 64,
) -> Tensor:  # fmt: skip
    """The mean over an image's views of what ``describe`` makes of each: ``[B, dim]``.

    Args:
        describe: ``[N, 3, h, w]`` to ``[N, dim]``.
        images, view, size, enlarge: see `views`.
        batch: views that are described at once.
    """
    seen = views(images, view, size, enlarge=enlarge)
    found = torch.cat([describe(part) for part in seen.flatten(0, 1).split(batch)])
    return found.unflatten(0, seen.shape[:2]).mean(1)


def fingerprint_of(kind: str, options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Hexadecimal digest of an extractor's kind, options and weights."""
    digest = hashlib.sha256(f"{kind} {sorted(options.items())}".encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
