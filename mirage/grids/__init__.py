"""Grouped restoration by how alike degradations are (GRIDS, arXiv 2407.12273): ``mirage grids``.

How far degradations lie from each other (`fit_ggd`, `kl_divergence`, `similarity`, `similarity_matrix`), the fewest
groups of them that can share a network (`search_groups`), networks trained and measured for that (`TrainAndMeasure`) or
published (`CachedPerformance`), and photographs restored by the nearest group's network (`GroupedRestorer`).

Modules are imported when a name of theirs is first asked for: importing this package is light.
"""

from __future__ import annotations

import importlib
from typing import Any

# What the degradations are told apart by comes first, what is done with groups of them second.
_PLACES: dict[str, str] = {}

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    """Import the module that ``name`` lies in on first use."""
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{place}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
