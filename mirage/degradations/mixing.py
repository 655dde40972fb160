"""Degradations of degradations: one after the other, and one of several; and how all of them are called by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirage.degradations.base import Applied, Degradation, draw_whole, registered

__all__ = ["CDD11", "ELEVEN", "Composition", "Mixture", "create", "create_from", "named"]

ELEVEN = ("GB", "MB", "RL", "SR", "RI", "DB", "JP", "PO", "IN", "GN", "SP")
"""GRIDS' degradations by id, in its order."""

CDD11 = ("low", "haze", "rain", "snow", "low_haze", "low_rain", "low_snow", "haze_rain", "haze_snow", "low_haze_rain",
         "low_haze_snow")  # fmt: skip
"""CDD11's degradations, as its folders are called. Each is applied in the recipe's order: low, rain, snow, haze."""

RECIPE = ("low", "rain", "snow", "haze")


@dataclass(frozen=True)
class Composition(Degradation):
    """One degradation after the other on the same image. It is clipped between them, and rounded at the end alone.

    Args:
        steps: the first one first.
    """

    steps: tuple[Degradation, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _several("steps", self.steps))

    @property
    def kind(self) -> str:
        return "+".join(step.kind for step in self.steps)

    @property
    def label(self) -> str:
        """CDD11's name where it is one of its compositions, else the long names with ``+`` between them."""
        names = [step.label for step in self.steps]
        if set(names) <= set(RECIPE) and names == sorted(set(names), key=RECIPE.index):
            return next((name for name in CDD11 if sorted(name.split("_")) == sorted(names)), "+".join(names))
        return "+".join(names)

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for step in self.steps for name in step.takes))

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        drawn = [step.draw(height, width, generator) for step in self.steps]
        return {"steps": [{"kind": each.kind, **each.values} for each in drawn]}

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError  # its records are taken apart step by step


@dataclass(frozen=True)
class Mixture(Degradation):
    """For each image one of several degradations, each as likely; rounding is theirs.

    Args:
        kinds: of which one is drawn.
    """

    kinds: tuple[Degradation, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", _several("kinds", self.kinds))

    @property
    def kind(self) -> str:
        return "|".join(each.kind for each in self.kinds)

    @property
    def label(self) -> str:
        return "|".join(each.label for each in self.kinds)

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for each in self.kinds for name in each.takes))

    def draw(self, height: int, width: int, generator: torch.Generator) -> Applied:
        chosen = self.kinds[draw_whole(generator, (0, len(self.kinds) - 1))]
        return chosen.draw(height, width, generator)

    def draw_values(self, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        return dict(self.draw(height, width, generator).values)

    @staticmethod
    def degrade(image: Tensor, values: Mapping[str, Any], maps: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError  # its records are of the kinds that were drawn


def create(name: str, **settings: Any) -> Degradation:
    """A degradation by its name.

    Args:
        name: an id (``"GB"``) or a long name (``"gaussian_blur"``), in capitals or not, with ``-`` or ``_``; one of
            `CDD11`; or several with ``+`` between them (``"GB+GN"``), applied in that order.
        settings: of a single degradation: ranges, such as ``sigma=(2, 4)`` or ``sigma=3``, and its other fields. Of
            several, ``rounded`` alone.

    Raises:
        ValueError: an unknown name, with the nearest known one; a setting or range that it does not have.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"kind: expected the name of a degradation, got {name!r}")
    parts = [_plain(part) for part in name.split("+")]
    if len(parts) == 1 and parts[0] in CDD11 and "_" in parts[0]:
        words = parts[0].split("_")
        parts = [each for each in RECIPE if each in words]
    if len(parts) > 1:
        return _created(Composition, name, {"steps": tuple(create(part) for part in parts), **settings})
    return _created(_class_named(parts[0], name), name, settings)


def create_from(description: Any) -> Degradation:
    """A degradation as configurations describe it.

    Args:
        description: a name, as of `create`; ``all`` for the mixture of `ELEVEN`; a mapping with a ``kind`` and settings
            (``{kind: GB, sigma: [2, 4]}``); or a list of these, of which each image gets one.

    Raises:
        ValueError: as `create`; or something else.
    """
    if isinstance(description, Degradation):
        return description
    if isinstance(description, str):
        return create_from(list(ELEVEN)) if description.strip().lower() == "all" else create(description)
    if isinstance(description, Mapping):
        settings = {str(key): value for key, value in description.items()}
        if not isinstance(settings.get("kind"), str):
            raise ValueError(f"kind: expected the name of a degradation beside its settings, got {dict(description)!r}")
        return create(settings.pop("kind"), **settings)
    if isinstance(description, (list, tuple)) and description:
        return Mixture(tuple(create_from(each) for each in description))
    raise ValueError(f"kind: expected a name, a mapping with kind, or a list of these, got {description!r}")


def named(names: Iterable[str]) -> dict[str, Degradation]:
    """Degradations by their labels, each once.

    Args:
        names: as of `create`; or ``all`` for `ELEVEN`, ``cdd11`` for `CDD11`.

    Raises:
        ValueError: as `create`.
    """
    groups = {"all": ELEVEN, "cdd11": CDD11}
    each = [name for given in names for name in groups.get(given.strip().lower(), (given,))]
    return {one.label: one for one in map(create, each)}


def _several(field: str, given: Iterable[Degradation]) -> tuple[Degradation, ...]:
    several = tuple(given)
    if not several or not all(isinstance(each, Degradation) for each in several):
        raise ValueError(f"{field}: expected at least one degradation, got {given!r}")
    if field == "steps" and any(isinstance(each, Mixture) for each in several):
        raise ValueError("steps: a mixture cannot be a step; mix compositions instead")
    return several


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _class_named(plain: str, given: str) -> type[Degradation]:
    by_name = {key: cls for cls in registered().values() for key in (cls.id.lower(), cls.name)}
    if plain in by_name:
        return by_name[plain]
    near = difflib.get_close_matches(plain, [*by_name, *CDD11], 1, cutoff=0.5)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    listed = ", ".join(f"{cls.id} ({cls.name})" for cls in registered().values())
    raise ValueError(f"kind: unknown degradation {given!r}{hint}. Known: {listed}, and {', '.join(CDD11[4:])}")


def _created(cls: type[Degradation], name: str, settings: dict[str, Any]) -> Degradation:
    import dataclasses

    own = [each.name for each in dataclasses.fields(cls) if each.name != "steps"]
    unknown = [key for key in settings if key not in own and key != "steps"]
    if unknown:
        raise ValueError(f"{name}: unknown setting {unknown[0]!r}; it has {', '.join(own)}")
    return cls(**settings)
