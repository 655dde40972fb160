"""Training of the small extractor, over `mirage.train`'s run: its data, schedule, checkpoints and logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirage.checkpoint import CheckpointError
from mirage.train.config import Config, ConfigError
from mirage.train.data.samples import Sample, TrainingSet
from mirage.train.run import Run
from mirage.train.state import State
from mirage.unirestorer.contrast import contrastive_loss, contrastive_targets, label_relations
from mirage.unirestorer.retrieval import measure_retrieval
from mirage.unirestorer.small_extractor import SmallExtractor

__all__ = ["ExtractorRun", "LabelledCrops", "middle"]

TEMPERATURE, RELATED = 0.1, 0.5
BATCH = 64


def middle(images: Tensor, margin: int) -> Tensor:
    """``[..., H, W]`` without ``margin`` pixels on each side."""
    return images[..., margin : images.shape[-2] - margin, margin : images.shape[-1] - margin]


class LabelledCrops(TrainingSet):
    """The samples of a training, each degraded crop without its margin, with the number of its label.

    Args:
        data, seed: as of `mirage.train.data.TrainingSet`; a set's name is its label, ``"type/strength"`` or ``"type"``.
        margin: pixels that are cut off on each side, behind the degradation.
    """

    def __init__(self, data: Any, seed: int, margin: int) -> None:
        super().__init__(data, seed)
        self.margin = margin
        self.labels = tuple(dict.fromkeys(pair.set for pair in self.pairs))
        self._numbers = {label: torch.tensor(number) for number, label in enumerate(self.labels)}

    def __getitem__(self, number: int) -> Sample:
        """The degraded crop ``[3, h, w]``, the number of its label in `labels`, and the label."""
        label = self.pair_of(number).set
        return Sample(middle(super().__getitem__(number).degraded, self.margin), self._numbers[label], label)


class _Terms(NamedTuple):
    contrastive: Tensor


class ExtractorRun(Run):
    """A run of `mirage.train` in which a `SmallExtractor` learns labels: the names of the configuration's sets.

    ``validation.csv`` has for pictures that are held out how often the nearest crop of another picture is of the same
    type, and of the same label.

    Args:
        config: of which data, optimizer, schedule, trainer and output count, and of the model its ``arguments``:
            ``width`` and ``dim``.
        margin: pixels of a degraded crop that the network does not see, on each side.
        temperature: of the loss.
        related: how right it is to take one strength of a type for another, 0 to 1.
        fabric: as of `mirage.train.Run`. Each process contrasts its own samples.

    Raises:
        ConfigError: a number is out of range, or there is one label alone.
    """

    def __init__(
        self, config: Config, *, margin: int = 8, temperature: float = TEMPERATURE, related: float = RELATED,
        fabric: Any = None,
    ) -> None:  # fmt: skip
        if not 0 <= 2 * margin < config.data.crop:
            raise ConfigError(f"margin: expected 0 to less than half of data.crop {config.data.crop}, got {margin}")
        if not temperature > 0:
            raise ConfigError(f"temperature: expected a positive number, got {temperature}")
        self.margin, self.temperature, self.related = margin, temperature, related
        super().__init__(config, fabric)

    def make_data(self) -> LabelledCrops:
        data = LabelledCrops(self.config.data, self.config.seed, self.margin)
        if len(data.labels) < 2:
            raise ConfigError(f"data.sets: expected two or more different names, got {', '.join(data.labels)}")
        self.labels = data.labels
        return data

    def make_loss(self) -> Tensor:
        return label_relations(self.labels, self.related)

    def make_network(self) -> nn.Module:
        try:
            network: Any = SmallExtractor(**self.config.model.arguments, size=self.config.data.crop - 2 * self.margin)
            return network.to(memory_format=torch.channels_last)  # faster on CPUs
        except TypeError as error:
            raise ConfigError(f"model.arguments: expected width and dim, got {self.config.model.arguments}") from error

    @property
    def extractor(self) -> SmallExtractor:
        """The network, averaged where the configuration says so; it is the training's own."""
        found: Any = self.network if self.average is None else self.average.module
        return found

    def load(self, state: State, path: Path) -> None:
        if state.arguments != self.network.config:
            raise CheckpointError(f"{path}: is of {state.arguments}, not of an extractor of {self.network.config}")
        super().load(state, path)

    def _loss(self, degraded: Tensor, clean: Tensor) -> tuple[Tensor, Any]:
        targets = contrastive_targets(clean.cpu(), self.loss)
        loss = contrastive_loss(self.model(degraded), targets, self.temperature)
        return loss, _Terms(loss.detach())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """How often the nearest held-out crop of another picture is of the same type, and of the same label."""
        found: dict[str, float] = {}
        if self._writes and len(self.validation):
            network = self.extractor.eval()
            crops, labels, pictures = [], [], []
            for label, sample in self.validation:
                crops.append(middle(sample.degraded, self.margin))
                labels.append(label)
                pictures.append(sample.name)
            parts = torch.stack(crops).split(BATCH)
            embeddings = torch.cat([network(self.fabric.to_device(part)).cpu() for part in parts])
            self.network.train()
            measured = measure_retrieval(embeddings, labels, pictures)
            found = {"type": measured.type, "label": measured.label}
            self._log("validation", {**found, "seconds": self.seconds})
        self.fabric.barrier()
        return found
