"""Samples of training: crops of pictures, augmented, with noise where it is asked for.

Sample number ``n`` of a run depends on the seed and on ``n`` alone, not on workers, devices or what ran before: an
interrupted run goes on with the very samples that it would have seen, on as many processes as there are then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mirage.degradations import Mixture
from mirage.degradations.rain import rain_streaks
from mirage.train.config import Data
from mirage.train.data.pictures import Reader
from mirage.train.data.sets import Pair, find_pairs
from mirage.wording import counted

__all__ = ["Sample", "TrainingSet", "ValidationSet", "augment", "batches"]

ORDER, SAMPLE = 0, 1  # what random numbers are for, part of their seed
SIGMAS = (15.0, 25.0, 50.0)  # at which a range of noise is validated


class Sample(NamedTuple):
    """What the network sees, what it should give, and the picture's name.

    Images are float32 ``[3, H, W]`` in [0, 1] (noise may leave it); in a batch ``[B, 3, H, W]``, and the names a list.
    For super-resolution the degraded one is as many times smaller as the set's scale says.
    """

    degraded: Tensor
    clean: Tensor
    name: str


def augment(image: np.ndarray, mode: int) -> np.ndarray:
    """One of the eight flips and rotations of ``[H, W, C]``: bits 0 and 1 count quarter turns, bit 2 then mirrors."""
    image = np.rot90(image, mode & 3)
    return image[:, ::-1] if mode & 4 else image


def draw_mode(kind: str, rng: np.random.Generator) -> int:
    """A mode of `augment`; of the released code's seven the identity is none, by an off-by-one there."""
    if kind == "all":
        return int(rng.integers(8))
    if kind == "released":
        return int(rng.integers(1, 8))
    return (0, 2, 4, 6)[int(rng.integers(4))] if kind == "flips" else 0


class TrainingSet(Dataset[Sample]):
    """Samples by their number in the run. Each epoch passes over all sets, repeats included, in an order of its own.

    Args:
        data: the configuration's.
        seed: of the run.

    Raises:
        FileNotFoundError, ConfigError: as `find_pairs`.
    """

    def __init__(self, data: Data, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.read = Reader(int(data.cache * 2**30) // max(1, data.workers))
        self.pairs: list[Pair] = []
        self.held_out: list[Pair] = []
        for one in data.sets:
            pairs = find_pairs(one, data.root)
            if data.hold_out >= len(pairs):
                found = counted(len(pairs), "picture")
                raise ValueError(f"data.hold_out: set {one.name!r} has {found}, got {data.hold_out}")
            kept = {round((i + 0.5) * len(pairs) / data.hold_out) for i in range(data.hold_out)}
            self.held_out += [pairs[i] for i in sorted(kept)]
            self.pairs += one.repeat * [pair for i, pair in enumerate(pairs) if i not in kept]
        if data.hold_out:
            _check_disjoint(self.pairs, self.held_out)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    @property
    def epoch(self) -> int:
        """Samples of an epoch."""
        return len(self.pairs)

    def pair_of(self, number: int) -> Pair:
        """What sample ``number`` is made of."""
        epoch, place = divmod(number, len(self.pairs))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            self._order = (epoch, rng.permutation(len(self.pairs)))
        return self.pairs[self._order[1][place]]

    def __getitem__(self, number: int) -> Sample:
        return self._sample(self.pair_of(number), np.random.default_rng([self.seed, SAMPLE, number]))

    def _sample(self, pair: Pair, rng: np.random.Generator) -> Sample:
        crop = self.data.crop
        clean, degraded = _read_pair(pair, self.read, crop)
        top, left = (int(rng.integers(n - crop + 1)) for n in clean.shape[:2])
        mode = draw_mode(self.data.augment, rng)
        clean, degraded = (augment(image[top : top + crop, left : left + crop], mode) for image in (clean, degraded))
        return Sample(_chw(_degrade(_floats(degraded), pair, rng)), _chw(_floats(clean)), pair.name)


class ValidationSet:
    """Centre crops of held-out pictures and of ``data.validation``, each with noise of its own, the same every time."""

    def __init__(self, data: Data, held_out: Sequence[Pair], seed: int) -> None:
        self.crop = data.validation_crop
        self.seed = seed
        self.read = Reader(int(data.cache * 2**30) // 8)
        pairs = [*held_out, *(pair for one in data.validation for pair in find_pairs(one, data.root))]
        self.entries = [entry for pair in pairs for entry in _measured_apart(pair)]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        """Name of what is measured (``"denoise_25"``), and the sample."""
        for number, (measure, pair) in enumerate(self.entries):
            clean, degraded = _read_pair(pair, self.read, self.crop)
            top, left = ((n - self.crop) // 2 for n in clean.shape[:2])
            place = np.s_[top : top + self.crop, left : left + self.crop]
            rng = np.random.default_rng([self.seed, number])
            seen = _degrade(_floats(degraded[place]), pair, rng)
            yield measure, Sample(_chw(seen), _chw(_floats(clean[place])), pair.name)


def _measured_apart(pair: Pair) -> list[tuple[str, Pair]]:
    """A range of noise at fixed strengths, and each kind of a mixture by itself; with what each is called."""
    from dataclasses import replace

    if pair.degradation is not None:
        kinds = pair.degradation.kinds if isinstance(pair.degradation, Mixture) else (pair.degradation,)
        names = [pair.set if len(kinds) == 1 else f"{pair.set}_{kind.label}" for kind in kinds]
        return [(name, replace(pair, degradation=kind)) for name, kind in zip(names, kinds, strict=True)]
    if pair.sigma is None:
        return [(pair.set, pair)]
    low, high = pair.sigma
    levels = [sigma for sigma in SIGMAS if low <= sigma <= high] if low < high else [low]
    return [(f"{pair.set}_{s:g}", replace(pair, sigma=(s, s))) for s in levels or [(low + high) / 2]]


def _check_disjoint(training: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    """Sets that share clean pictures could train on what another one holds out."""
    seen = {pair.clean for pair in training}
    shared = [pair.clean.name for pair in held_out if pair.clean in seen]
    if shared:
        raise ValueError(
            f"data.hold_out: {len(shared)} pictures that one set holds out are trained on by another, such as "
            f"{shared[0]}; list the sets' files apart, or name pictures in data.validation"
        )


def _read_pair(pair: Pair, read: Reader, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Clean and degraded, mirrored at their lower and right borders where they are smaller than the crop."""
    clean = read(pair.clean)
    degraded = clean if pair.degraded is None else read(pair.degraded)
    if clean.shape != degraded.shape:
        raise ValueError(f"{pair.name}: is {degraded.shape[:2]}, and its clean picture {clean.shape[:2]}")
    missing = [(0, max(0, crop - n)) for n in clean.shape[:2]]
    if any(after for _, after in missing):
        clean, degraded = (np.pad(image, [*missing, (0, 0)], mode="symmetric") for image in (clean, degraded))
    return clean, degraded


def _degrade(image: np.ndarray, pair: Pair, rng: np.random.Generator) -> np.ndarray:
    """``[H, W, 3]`` in [0, 1] with rain, made smaller, and with Gaussian noise that is left as it is, or clipped
    and brought to 8 bits, as the set says.

    Rain alone is clipped and rounded to 8 bits, as pictures of rain are, and so is what a degradation makes.
    """
    if pair.degradation is not None:
        batch = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
        degraded, _ = pair.degradation(batch, int(rng.integers(2**63)))
        image = degraded[0].transpose(1, 2, 0)
        return image if pair.scale == 1 else reduce(image, pair.scale)
    if pair.rain:
        height, width = image.shape[:2]
        image = np.clip(image + rain_streaks(height, width, rng)[:, :, None], 0, 1)
    if pair.scale > 1:
        image = reduce(image, pair.scale)
    if pair.sigma is None and pair.rain:
        return np.rint(image * 255) / np.float32(255)
    if pair.sigma is None:
        return image
    sigma = np.float32(rng.uniform(*pair.sigma) / 255)
    noisy = image + sigma * rng.standard_normal(image.shape, dtype=np.float32)
    if pair.noise == "float":
        return noisy
    levels = np.clip(noisy * 255, 0, 255)
    return (np.rint(levels) if pair.noise == "rounded" else np.trunc(levels)) / np.float32(255)


def reduce(image: np.ndarray, scale: int) -> np.ndarray:
    """``[H, W, 3]`` made ``scale`` times smaller by bicubic interpolation with antialiasing; clipped, not rounded.

    The kernel is that of MATLAB's imresize and of Pillow: as wide as ``scale`` times the cubic's four pixels.

    Args:
        image: H and W multiples of ``scale``.
    """
    height, width = image.shape[:2]
    smaller = F.interpolate(
        _chw(image)[None], (height // scale, width // scale), mode="bicubic", antialias=True, align_corners=False
    )
    return smaller[0].clamp(0, 1).numpy().transpose(1, 2, 0)


def _floats(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / np.float32(255)


def _chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class _Numbers(Sampler[int]):
    """The sample numbers of one process from ``first`` on: its share of each step's batch."""

    def __init__(self, first: int, steps: int, batch: int, rank: int, world: int) -> None:
        self.first, self.steps, self.batch, self.rank, self.world = first, steps, batch, rank, world

    def __iter__(self) -> Iterator[int]:
        share = self.batch // self.world
        for step in range(self.steps):
            start = self.first + step * self.batch + self.rank * share
            yield from range(start, start + share)

    def __len__(self) -> int:
        return self.steps * (self.batch // self.world)


def batches(
    data: TrainingSet, first: int, steps: int, passes: int = 1, rank: int = 0, world: int = 1
) -> Iterator[Sample]:
    """Batches of one process, ``passes`` for each of ``steps`` steps, from sample number ``first`` on.

    Raises:
        ValueError: ``data.batch`` cannot be shared evenly.
    """
    batch, workers = data.data.batch, data.data.workers
    if batch <= 0 or batch % (world * passes):
        raise ValueError(
            f"data.batch: expected a multiple of processes x accumulated passes ({world} x {passes}), got {batch}"
        )
    return iter(
        DataLoader(
            data,
            batch // world // passes,
            sampler=_Numbers(first, steps, batch, rank, world),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
