"""The degraded images that a tree is made of: the first samples of a training, by their numbers.

Sample number n of a configuration of `mirage.train` depends on its data, its seed and on n alone (crop, degradation and
all that was drawn for it). So a tree's members are numbers, no image has to be kept, and the expert of a node trains on
the very images that were clustered into it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mirage.train.config import Config, Data
from mirage.train.data.samples import Sample, TrainingSet
from mirage.unirestorer.extractors import Extractor
from mirage.whole_files import safetensors_bytes, write_whole

__all__ = ["MemberSet", "data_identity", "embed_samples", "one_set_a_kind"]

OF_THE_MACHINE = ("root", "workers", "cache", "batch", "validation", "validation_crop")
SECONDS_BETWEEN_WRITES = 30.0
ORDER = 3  # what random numbers are for, part of their seed


def one_set_a_kind(data: Data) -> Data:
    """The same data with a set for each degradation, named as that: the tasks that the tree counts.

    A set with one degradation or none keeps its name.
    """
    from mirage.grids.training import named_kinds

    sets = []
    for one in data.sets:
        kinds = named_kinds(one.kind)
        if len(kinds) == 1 and one.name or not kinds:
            sets.append(one)
        else:
            sets += [dataclasses.replace(one, name=name, kind=kind) for name, kind in kinds.items()]
    return dataclasses.replace(data, sets=sets)


def data_identity(config: Config) -> dict[str, Any]:
    """What of a configuration decides its samples, as JSON has it."""
    tree = dataclasses.asdict(one_set_a_kind(config.data))
    own = {name: value for name, value in tree.items() if name not in OF_THE_MACHINE}
    return json.loads(json.dumps({"seed": config.seed, **own}))


class MemberSet(TrainingSet):
    """A training on some of the samples of a configuration, over and over, in an order of its own for each pass.

    Args:
        data, seed: as of `mirage.train.data.TrainingSet`.
        members: numbers of the samples.
    """

    def __init__(self, data: Data, seed: int, members: Sequence[int] | Tensor) -> None:
        super().__init__(data, seed)
        self.members = np.asarray(members, np.int64)
        if not len(self.members):
            raise ValueError("members: expected at least one sample, got none")
        self._pass: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    @property
    def epoch(self) -> int:
        return len(self.members)

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.members))
        if self._pass[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            self._pass = (epoch, rng.permutation(len(self.members)))
        return super().__getitem__(int(self.members[self._pass[1][place]]))


class _Labelled(Dataset[tuple[Tensor, str]]):
    def __init__(self, data: TrainingSet) -> None:
        self.data = data

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        return self.data[number].degraded, self.data.pair_of(number).set


@torch.no_grad()
def embed_samples(
    config: Config,
    count: int,
    extractor: Extractor,
    *,
    cache: Path | None = None,
    batch: int = 16,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, list[str]]:
    """Embeddings and tasks of the first samples.

    Args:
        config: of which data and seed count.
        count: of samples.
        extractor: what makes the embeddings.
        cache: a file that a run which was stopped goes on from, and that others with the same data and extractor read.
        batch: images at a time.
        on_step: called with how many are done, and how many there are.

    Returns:
        ``[count, dim]``, and a task for each: the name of its set of `one_set_a_kind`.

    Raises:
        ValueError: the extractor's embeddings are not finite.
    """
    data = TrainingSet(one_set_a_kind(config.data), config.seed)
    identity = _digest({"data": data_identity(config), "extractor": _identity_of(extractor)})
    found = _read(cache, identity)[:count]
    done = len(found)
    loader: DataLoader[Any] = DataLoader(
        _Labelled(data), batch, sampler=range(done, count), num_workers=config.data.workers
    )
    parts = [found] if done else []
    saved = time.monotonic()
    for images, _ in loader:
        parts.append(extractor.embed(images).float().cpu())
        if not bool(torch.isfinite(parts[-1]).all()):
            raise ValueError(f"extractor: gave embeddings that are not finite, among samples {done} and following")
        done += len(images)
        if on_step is not None:
            on_step(done, count)
        if cache is not None and (time.monotonic() - saved > SECONDS_BETWEEN_WRITES or done == count):
            parts, saved = [torch.cat(parts)], time.monotonic()
            _write(cache, identity, parts[0])
    return torch.cat(parts), [data.pair_of(number).set for number in range(count)]


def _identity_of(extractor: Any) -> Any:
    return getattr(extractor, "fingerprint", None) or repr(extractor)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(cache: Path | None, identity: str) -> Tensor:
    import safetensors

    nothing = torch.empty(0, 0)
    if cache is None or not cache.is_file():
        return nothing
    try:
        with safetensors.safe_open(cache, framework="pt") as file:
            return file.get_tensor("embeddings") if (file.metadata() or {}).get("of") == identity else nothing
    except (safetensors.SafetensorError, OSError):
        return nothing


def _write(cache: Path, identity: str, embeddings: Tensor) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cache, safetensors_bytes({"embeddings": embeddings.contiguous()}, {"of": identity}))
