"""How the network of a group is trained and measured: by `mirage.train`, and on fixed degraded pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirage.extras import not_there
from mirage.grids.groups import check_names

__all__ = ["MOST_PSNR", "MeasureGroup", "TrainGroup", "config_identity", "named_kinds", "psnr"]

MOST_PSNR = 100.0
"""dB; what equal pictures count as, so that means and differences stay finite."""

OF_THE_MACHINE = {  # of a configuration: they say where and how fast, and leave results as they are
    "output": None,
    "trainer": ("accelerator", "devices", "nodes", "strategy", "threads", "resume"),
    "data": ("root", "workers", "cache", "validation", "validation_crop"),
}


def psnr(target: np.ndarray, restored: np.ndarray) -> float:
    """PSNR in dB of RGB in [0, 1], without a border that is cut off: clipped, not rounded, of all channels together.

    What ``mirage evaluate`` calls ``psnr``, except that equal pictures have `MOST_PSNR`.

    Args:
        target, restored: ``[H, W, 3]``, floating point.

    Raises:
        ValueError: shapes differ, or a value is not finite.
    """
    if target.shape != restored.shape:
        raise ValueError(f"restored: expected the shape of the target, {target.shape}, got {restored.shape}")
    if not np.isfinite(restored).all():
        raise ValueError("restored: it has values that are not finite")
    error = np.square(np.clip(restored, 0, 1).astype(np.float64) - np.clip(target, 0, 1).astype(np.float64)).mean()
    return MOST_PSNR if error == 0 else min(MOST_PSNR, -10 * math.log10(error))


@dataclass(frozen=True)
class TrainGroup:
    """Trains the network of a group as a configuration of `mirage.train` says.

    Args:
        config: whose sets with a ``kind`` get those of the group's degradations, each as likely; other sets stay as
            they are. Every group trains for the same number of steps.
        dtype: of the weights that are kept.

    Raises:
        ValueError: the configuration has no such set.
    """

    config: Any
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError(
                "config: data.sets: expected a set with a kind, whose pictures get the degradations of a group"
            )

    @property
    def kinds(self) -> dict[str, Any]:
        """The degradations that can be grouped, by name, as the configuration has them: a name, or settings too."""
        return {name: kind for one in self.config.data.sets for name, kind in named_kinds(one.kind).items()}

    @property
    def degradations(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.kinds)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of each training, where the configuration says it in steps."""
        return self.config.schedule.steps

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the networks, as JSON has it."""
        return {"dtype": self.dtype, **config_identity(self.config)}

    def config_of(self, group: Sequence[str], folder: Path) -> Any:
        """The configuration of one group, which writes to a folder."""
        check_names(group, self.kinds, "group")
        sets = [
            one if one.kind is None else dataclasses.replace(one, kind=[self.kinds[name] for name in group])
            for one in self.config.data.sets
        ]
        return dataclasses.replace(
            self.config,
            data=dataclasses.replace(self.config.data, sets=sets),
            output=dataclasses.replace(self.config.output, folder=str(folder)),
        )

    def __call__(self, group: Sequence[str], folder: Path, weights: Path) -> None:
        """Train, going on from a checkpoint of an earlier run, and write the weights; checkpoints are removed then.

        Args:
            group: names of its degradations.
            folder: of the run: checkpoints, logs, and ``log.txt`` with what the trainer prints.
            weights: the file, ``.safetensors``.

        Raises:
            mirage.train.Interrupted: it was told to stop; a checkpoint is written.
            FloatingPointError, ValueError, OSError: as `mirage.train.Run`.
        """
        missing = not_there("train", "lightning_fabric", "yaml")
        if missing is not None:
            raise ImportError(missing)
        from mirage.train import Run, export_weights
        from mirage.train.state import checkpoints

        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            Run(self.config_of(group, folder)).train()
        export_weights(folder, weights, dtype=self.dtype)
        for file in checkpoints(folder):
            file.unlink()


def config_identity(config: Any) -> dict[str, Any]:
    """What of a configuration of `mirage.train` decides the weights, as JSON has it."""
    tree = dataclasses.asdict(config)
    for part, keys in OF_THE_MACHINE.items():
        for key in tree[part] if keys is None else keys:
            tree[part] = {name: value for name, value in tree[part].items() if name != key}
    return {name: value for name, value in tree.items() if name != "output"}


def named_kinds(kind: Any) -> dict[str, Any]:
    """The single degradations in what a configuration has as ``kind``, by name: ids, or a composition's own name.

    Raises:
        ValueError: one is unknown, comes twice, or is a composition without a name of its own.
    """
    from mirage.degradations import ELEVEN, create_from

    if kind is None:
        return {}
    if isinstance(kind, str) and kind.strip().lower() == "all":
        kind = ELEVEN
    found: dict[str, Any] = {}
    for each in kind if isinstance(kind, (list, tuple)) else [kind]:
        name = create_from(each).kind
        if "+" in name:
            name = str(each.get("kind") if isinstance(each, Mapping) else each)
        if "+" in name or name in found:
            raise ValueError(f"kind: expected degradations of different names without +, got {kind!r}")
        found[name] = each
    return found


@dataclass(frozen=True)
class MeasureGroup:
    """Measures a network: P(M, d) is the mean PSNR over fixed pictures, each degraded by d in the same way every time.

    Args:
        folder: of clean pictures.
        crop: side of the squares that are cut out of their centres, before they are degraded; None: whole pictures.
        limit: the first so many pictures, by name; None: all.
        seed: of the degradations. What one picture gets depends on the seed, the picture's name and the degradation
            alone, not on the group or on other pictures.
        device: of the network.
        kinds: what stands for a name among the degradations, where that is not the name itself: as `mirage.train` has
            it in ``kind``.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        ValueError: a number makes no sense.
    """

    folder: str
    crop: int | None = 128
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    kinds: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("crop", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.files()

    def files(self) -> list[Path]:
        """The pictures, by name."""
        from mirage.train.data.pictures import files_in

        return files_in(Path(self.folder))[: self.limit]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the values, as JSON has it: also a digest of the pictures' names and sizes."""
        names = [f"{file.relative_to(self.folder).as_posix()} {file.stat().st_size}" for file in self.files()]
        digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
        kinds = {name: kind for name, kind in self.kinds if kind != name}
        return {"pictures": len(names), "digest": digest, "crop": self.crop, "seed": self.seed, "kinds": kinds}

    def pairs(self, degradation: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Degraded and clean pictures, ``[H, W, 3]``, float32 in [0, 1].

        Raises:
            ValueError: the degradation is unknown, or a picture cannot be read or is smaller than the crop.
        """
        from mirage.degradations import create_from, generator_of
        from mirage.train.data.pictures import Picture, Reader

        degrade = create_from(dict(self.kinds).get(degradation, degradation))
        read = Reader()
        for file in self.files():
            name = file.relative_to(self.folder).with_suffix("").as_posix()
            clean = self._cropped(read(Picture(str(file), str(file))), name).astype(np.float32) / np.float32(255)
            generator = generator_of(self.seed, f"{degradation}/{name}")
            degraded, _ = degrade(clean.transpose(2, 0, 1)[None], generator)
            yield degraded[0].transpose(1, 2, 0), clean

    def _cropped(self, pixels: np.ndarray, name: str) -> np.ndarray:
        if self.crop is None:
            return pixels
        height, width = pixels.shape[:2]
        if min(height, width) < self.crop:
            raise ValueError(f"{name}: expected at least {self.crop} pixels a side, got {height}x{width}")
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        return pixels[top : top + self.crop, left : left + self.crop]

    def __call__(self, weights: str | os.PathLike[str] | Any, group: Sequence[str]) -> dict[str, list[float]]:
        """PSNR in dB of each picture, by degradation.

        Args:
            weights: a file, or what `mirage.Restorer` takes.
            group: the degradations.
        """
        import mirage

        restore = mirage.Restorer(weights, device=self.device)
        return {d: [psnr(clean, restore(np.ascontiguousarray(seen))) for seen, clean in self.pairs(d)] for d in group}
