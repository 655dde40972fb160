"""How well an extractor tells degradations apart: whether the nearest crop of another picture is degraded alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage.unirestorer.contrast import type_of
from mirage.unirestorer.extractors import Extractor

__all__ = ["LabelledImages", "Retrieval", "embed_all", "labelled_images", "measure_retrieval"]


@dataclass(frozen=True)
class Retrieval:
    """How often the nearest other embedding, of another picture, is of the same kind.

    Attributes:
        type: part of samples whose nearest one is of their type.
        label: the same of type and strength.
        by_label: ``label`` of each label's samples.
        confused: of each label, the label that its nearest ones have most often.
    """

    type: float
    label: float
    by_label: dict[str, float]
    confused: dict[str, str]


def measure_retrieval(embeddings: Tensor, labels: Sequence[str], pictures: Sequence[str]) -> Retrieval:
    """Look for each sample's nearest one, by cosine, among those of other pictures.

    Args:
        embeddings: ``[N, dim]``.
        labels: of each sample, ``"type/strength"`` or ``"type"``.
        pictures: what picture each sample was made of; the same content tells nothing of its degradation.

    Raises:
        ValueError: the numbers of samples differ, or all are of one picture.
    """
    if not len(embeddings) == len(labels) == len(pictures):
        raise ValueError(
            f"embeddings: expected as many as labels and pictures, got {len(embeddings)}, {len(labels)}, "
            f"{len(pictures)}"
        )
    if len(set(pictures)) < 2:
        raise ValueError(f"pictures: expected at least two different ones, got {sorted(set(pictures))}")
    z = torch.nn.functional.normalize(embeddings.double())
    numbers = {name: number for number, name in enumerate(dict.fromkeys(pictures))}
    picture = torch.tensor([numbers[name] for name in pictures])
    cosines = (z @ z.T).masked_fill(picture[:, None] == picture, -math.inf)
    found = [labels[place] for place in cosines.argmax(1).tolist()]
    rows: dict[str, list[str]] = {}
    for label, nearest in zip(labels, found, strict=True):
        rows.setdefault(label, []).append(nearest)
    return Retrieval(
        sum(type_of(a) == type_of(b) for a, b in zip(labels, found, strict=True)) / len(labels),
        sum(a == b for a, b in zip(labels, found, strict=True)) / len(labels),
        {label: each.count(label) / len(each) for label, each in rows.items()},
        {label: max(sorted(set(each)), key=each.count) for label, each in rows.items()},
    )


@dataclass(frozen=True)
class LabelledImages:
    """Degraded crops of pictures.

    Attributes:
        images: float32 ``[N, 3, size, size]`` in [0, 1].
        labels: of each, the name of its set: ``"type/strength"`` or ``"type"``.
        pictures: of each, which crop of a clean picture it was made of.
    """

    images: Tensor
    labels: tuple[str, ...]
    pictures: tuple[str, ...]

    @property
    def types(self) -> tuple[str, ...]:
        """Labels without strengths."""
        return tuple(map(type_of, self.labels))


def labelled_images(pictures: str | Path, data: Any, count: int = 8, size: int = 128, seed: int = 0) -> LabelledImages:
    """The same crops of pictures for each label, degraded by it.

    Args:
        pictures: a folder; crops come of as many different pictures as it has.
        data: of a configuration of `mirage.train`, whose sets have names and kinds.
        count: of crops.
        size: of their sides, in pixels.
        seed: of crops and degradations.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no pictures of that size, or a set has no kind.
    """
    from mirage.degradations import create_from
    from mirage.grids.matrix import degraded_patches
    from mirage.grids.patches import sample_patches

    clean = sample_patches(pictures, count, size, seed)
    images, labels = [], []
    for one in data.sets:
        if one.kind is None:
            raise ValueError(f"data.sets: expected a kind of each set, got none of {one.name!r}")
        images.append(degraded_patches(create_from(one.kind), clean, one.name, size, seed))
        labels += [one.name] * count
    names = [f"crop {number}" for number in range(count)] * len(data.sets)
    return LabelledImages(torch.cat(images), tuple(labels), tuple(names))


def embed_all(extractor: Extractor, images: Tensor, batch: int = 16) -> Tensor:
    """Embeddings of images of one size, ``[N, dim]`` on the CPU."""
    return torch.cat([extractor.embed(part).cpu() for part in images.split(batch)])
