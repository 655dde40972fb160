"""Images to their experts: grouped, padded once, each group run once, and results back in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mirage.networks.common import pad_to_multiple

if TYPE_CHECKING:
    from mirage.unirestorer.store import ExpertStore

__all__ = ["MULTIPLE", "ExpertModules", "Experts", "StoredExperts", "dispatch"]

MULTIPLE = 8
"""What images are padded to multiples of before experts see them."""


class Experts(Protocol):
    """Restorers by number."""

    def __len__(self) -> int: ...

    def run(self, images: Tensor, experts: Sequence[int]) -> Tensor:
        """Restore ``images``, ``[B, 3, H, W]``, H and W multiples of 8, each by the expert of its number."""
        ...

    def network(self, expert: int) -> AbstractContextManager[nn.Module]:
        """An expert's network while a block runs, for `mirage.Restorer`. It is not to be changed."""
        ...


class ExpertModules:
    """Experts that are modules, all in memory.

    Args:
        modules: by number; each maps ``[B, 3, H, W]`` to the same shape. They are put into evaluation mode, and run
            without gradients.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        if not len(modules):
            raise ValueError("modules: expected at least one expert, got none")
        self.modules = [module.eval() for module in modules]

    def __len__(self) -> int:
        return len(self.modules)

    @torch.no_grad()
    def run(self, images: Tensor, experts: Sequence[int]) -> Tensor:
        """Each image restored by its expert; each expert runs once."""
        restored = torch.empty_like(images)
        for expert in sorted(set(experts)):
            own = [i for i, each in enumerate(experts) if each == expert]
            restored[own] = self.modules[expert](images[own])
        return restored

    @contextmanager
    def network(self, expert: int) -> Iterator[nn.Module]:
        """The module."""
        yield self.modules[expert]


class StoredExperts:
    """The experts of an `mirage.unirestorer.ExpertStore`, by number: the order in which they were added.

    Args:
        store: the store.
    """

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        self.names = store.names

    def __len__(self) -> int:
        return len(self.names)

    def run(self, images: Tensor, experts: Sequence[int]) -> Tensor:
        """Each image restored by its expert; each expert runs once."""
        return self.store.restore(images, [self.names[expert] for expert in experts])

    def network(self, expert: int) -> AbstractContextManager[nn.Module]:
        """The network, folded and accelerated."""
        return self.store.network(self.names[expert])


def dispatch(experts: Experts, images: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    """Restore images of any sizes, each by one expert.

    Images of an expert that have the same size, once they are padded to multiples of 8 (mirrored, or where a side is
    not longer than its padding its edge again), run together; all images of an expert are done before the next comes.

    Args:
        experts: the experts.
        images: each ``[3, H, W]``, floating point.
        numbers: of each image's expert.

    Returns:
        Each image restored, in the images' order and sizes.

    Raises:
        ValueError: another count of numbers than of images, a number that is no expert's, or an image of another shape.
    """
    if len(images) != len(numbers):
        raise ValueError(f"numbers: expected one for each of {len(images)} images, got {len(numbers)}")
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, (image, number) in enumerate(zip(images, numbers, strict=True)):
        if not 0 <= number < len(experts):
            raise ValueError(f"numbers: expected experts from 0 to {len(experts) - 1}, got {number}")
        if image.ndim != 3 or not image.numel():
            raise ValueError(f"images: expected [3, H, W], not empty, got {list(image.shape)}")
        height, width = (side + -side % MULTIPLE for side in image.shape[1:])
        groups.setdefault((number, height, width), []).append(i)
    restored: list[Tensor] = list(images)
    for (number, _, _), own in sorted(groups.items()):
        batch = torch.cat([pad_to_multiple(images[i][None], MULTIPLE) for i in own])
        for i, result in zip(own, experts.run(batch, [number] * len(own)), strict=True):
            restored[i] = result[:, : images[i].shape[1], : images[i].shape[2]]
    return restored
