"""How alike degradations are: each applied to the same clean patches, its features fitted, all compared with all.

Each degradation is measured by itself, from random numbers of its own, so that it gets the same parameters whatever
else is measured; what is found is kept in a file from which the next call goes on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage.grids.features import MEMORY, Descriptor, descriptor_ggd
from mirage.grids.ggd import CLIP, COMPONENTS, GGD, kl_divergence, scaled
from mirage.grids.kept import Kept, fingerprint_of, read_json
from mirage.grids.pca import check_components
from mirage.grids.selection import PATCH
from mirage.whole_files import write_whole

__all__ = ["SimilarityMatrix", "degraded_patches", "similarity_matrix"]

FORMAT = "mirage degradation similarity, version 1"
BATCH = 32  # patches that are degraded at once


@dataclass(frozen=True)
class SimilarityMatrix:
    """GGDs of degradations, and how far they lie apart. NumPy takes it as the array `values`.

    Args:
        ggds: of each degradation, by its name.
        settings: what they were measured with.

    Raises:
        ValueError: there is no degradation.
    """

    ggds: Mapping[str, GGD]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ggds:
            raise ValueError("ggds: expected at least one degradation, got none")

    @property
    def names(self) -> tuple[str, ...]:
        """The degradations, in the order of rows and columns."""
        return tuple(self.ggds)

    @property
    def divergences(self) -> np.ndarray:
        """KL(row || column) in nats, float64 ``[n, n]``."""
        return np.array([[kl_divergence(p, q) for q in self.ggds.values()] for p in self.ggds.values()])

    @property
    def values(self) -> np.ndarray:
        """S(row, column), float64 ``[n, n]``; not symmetric, and 0 on the diagonal."""
        return np.vectorize(scaled, otypes=[np.float64])(self.divergences)

    @property
    def symmetric(self) -> np.ndarray:
        """The mean of `values` and its transpose."""
        return (self.values + self.values.T) / 2

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values.astype(dtype or np.float64, copy=False)

    def distance(self, group: Collection[str]) -> float:
        """The distance of a group: the mean of S over its ordered pairs; 0 of a single degradation.

        Raises:
            ValueError: the group is empty, or has a name that was not measured.
        """
        places = [self._place(name) for name in dict.fromkeys(group)]
        if not places:
            raise ValueError("group: expected at least one degradation, got none")
        inside = self.values[np.ix_(places, places)]
        pairs = len(places) * (len(places) - 1)
        return float(inside.sum() / pairs) if pairs else 0.0

    def _place(self, name: str) -> int:
        if name not in self.ggds:
            raise ValueError(f"group: expected some of {', '.join(self.names)}, got {name!r}")
        return self.names.index(name)

    def clustered(self) -> tuple[np.ndarray, list[int]]:
        """Average linkage of the symmetric matrix, as SciPy has it, and the order of its leaves, neighbours alike.

        Raises:
            ModuleNotFoundError: SciPy is not installed (the extra ``grids``).
            ValueError: there is one degradation, or a distance is infinite.
        """
        from scipy.cluster.hierarchy import leaves_list, linkage

        if len(self.names) < 2:
            raise ValueError(f"expected at least two degradations to cluster, got {len(self.names)}")
        above = self.symmetric[np.triu_indices(len(self.names), 1)]
        tree = linkage(above, "average", optimal_ordering=True)
        return tree, [int(leaf) for leaf in leaves_list(tree)]

    def save(self, path: str | Path) -> None:
        """Write names, parameters, S and KL as JSON (``.json``), or S alone as a table (``.csv``); whole or not at all.

        Raises:
            ValueError: the name ends otherwise.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".csv":
            write_whole(path, table("", self.names, self.names, self.values).encode())
        elif path.suffix == ".json":
            write_whole(path, (json.dumps(self._content(), indent=1) + "\n").encode())
        else:
            raise ValueError(f"path: expected a name that ends in .json or .csv, got {str(path)!r}")

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "parameters": {name: {"alpha": g.alpha, "sigma": g.sigma} for name, g in self.ggds.items()},
            "similarity": self.values.tolist(),
            "divergence": self.divergences.tolist(),
        }

    @classmethod
    def load(cls, path: str | Path) -> SimilarityMatrix:
        """Read what `save` wrote as JSON; S and KL follow from the parameters.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none of these.
        """
        content = read_json(Path(path))
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: expected a file of {FORMAT!r}, got {content.get('format')!r}")
        try:
            ggds = {name: GGD(each["alpha"], each["sigma"]) for name, each in content["parameters"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected alpha and sigma of each degradation: {error}") from error
        return cls(ggds, content.get("settings", {}))


def similarity_matrix(
    descriptor: Descriptor, images: Tensor, degradations: Iterable[Any] | Mapping[str, Any], *,
    components: int = COMPONENTS, patch: int = PATCH, seed: int = 0, memory: int = MEMORY,
    cache: str | Path | None = None, progress: Callable[[str, GGD], None] | None = None,
) -> SimilarityMatrix:  # fmt: skip
    """Measure how alike degradations are.

    Args:
        descriptor: see `mirage.grids.Descriptor`.
        images: clean patches ``[N, 3, H, W]``, float32 in [0, 1], such as `sample_patches` draws; N above
            ``components``.
        degradations: each what `mirage.degradations.create_from` takes (``"GB"``, ``{"kind": "GN", "sigma": 25}``, a
            degradation), called by its id; or a mapping from names of your own to these, or to other functions
            ``degraded, parameters = degradation(batch, generator)``.
        components: of the fits.
        patch: side of the middle of a degraded patch that the descriptor sees, in pixels.
        seed: of the degradations.
        memory: bytes of features that are held at a time.
        cache: a JSON file of GGDs, read and added to: what was measured with the same descriptor, patches, degradation
            and settings is not measured again. It needs a descriptor with a ``fingerprint``.
        progress: called with the name and the GGD of each degradation, when it is there.

    Raises:
        ValueError: there are too few patches, two degradations of one name, an unknown one; or one leaves nothing to
            fit, such as constant patches.
    """
    named = _named(degradations)
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < patch:
        raise ValueError(f"images: expected [N, 3, H, W] of at least {patch}x{patch} pixels, got {list(images.shape)}")
    check_components(components, len(images))
    settings = {"patches": len(images), "crop": list(images.shape[2:]), "patch": patch, "components": components,
                "seed": seed, "clip": CLIP}  # fmt: skip
    kept = None if cache is None else _Kept(Path(cache), descriptor, images, settings)
    ggds: dict[str, GGD] = {}
    for name, degradation in named.items():
        ggd = None if kept is None else kept.find(name, degradation)
        if ggd is None:
            try:
                seen = degraded_patches(degradation, images, name, patch, seed)
                ggd = descriptor_ggd(descriptor, seen, components, memory=memory)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if kept is not None:
                kept.add(name, degradation, ggd)
        ggds[name] = ggd
        if progress is not None:
            progress(name, ggd)
    described = {name: repr(each) for name, each in named.items()}
    return SimilarityMatrix(ggds, {**settings, "degradations": described})


def degraded_patches(degradation: Any, images: Tensor, name: str, patch: int = PATCH, seed: int = 0) -> Tensor:
    """The middles of patches, degraded whole: float32 ``[N, 3, patch, patch]``.

    Args:
        degradation: ``degraded, parameters = degradation(batch, generator)``.
        images: ``[N, 3, H, W]``, float32 in [0, 1].
        name: which, with ``seed``, decides the random numbers.
    """
    from mirage.degradations import generator_of

    generator = generator_of(seed, name)
    top, left = ((side - patch) // 2 for side in images.shape[2:])
    found = torch.empty(len(images), 3, patch, patch)
    for part, place in zip(images.split(BATCH), found.split(BATCH), strict=True):
        degraded, _ = degradation(part, generator)
        place.copy_(degraded[:, :, top : top + patch, left : left + patch])
    return found


def _named(degradations: Iterable[Any] | Mapping[str, Any]) -> dict[str, Any]:
    from mirage.degradations import create_from

    if isinstance(degradations, Mapping):
        named = {name: each if callable(each) else create_from(each) for name, each in degradations.items()}
    else:
        named = {}
        for each in [degradations] if isinstance(degradations, str) else degradations:
            made = create_from(each)
            if made.kind in named:
                raise ValueError(f"degradations: expected each once, got {made.kind} twice; name them in a mapping")
            named[made.kind] = made
    if not named:
        raise ValueError("degradations: expected at least one, got none")
    return named


class _Kept:
    """GGDs in a file, each under a digest of everything that it depends on."""

    def __init__(self, path: Path, descriptor: Any, images: Tensor, settings: Mapping[str, Any]) -> None:
        fingerprint = fingerprint_of(descriptor)
        digest = hashlib.sha256(json.dumps([FORMAT, fingerprint, dict(settings)], sort_keys=True).encode())
        digest.update(images.detach().cpu().contiguous().numpy().tobytes())
        self.common = digest.hexdigest()
        self.kept = Kept(path, FORMAT)

    def _key(self, name: str, degradation: Any) -> str:
        return hashlib.sha256(f"{self.common} {name} {degradation!r}".encode()).hexdigest()

    def find(self, name: str, degradation: Any) -> GGD | None:
        entry = self.kept.find(self._key(name, degradation))
        return None if entry is None else GGD(entry["alpha"], entry["sigma"])

    def add(self, name: str, degradation: Any, ggd: GGD) -> None:
        self.kept.add(self._key(name, degradation), {"name": name, "alpha": ggd.alpha, "sigma": ggd.sigma})


def table(corner: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray) -> str:
    """A matrix as CSV, its rows and columns with their names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([corner, *columns])
    writer.writerows([name, *(repr(float(value)) for value in row)] for name, row in zip(rows, values, strict=True))
    return text.getvalue()
