"""MIRAGE, an all-in-one image restoration network (arXiv 2505.18679), and what people do with it.

The names below are the reference network in plain PyTorch, its losses and its checkpoints. The submodules
(`mirage.fast`, `mirage.complexity`, ...) are imported when they are first used; importing this package compiles nothing
and needs neither Triton, a compiler nor a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from mirage import losses
from mirage.checkpoint import CheckpointError, CheckpointWarning, from_checkpoint, load_checkpoint, save_checkpoint
from mirage.model import MIRAGE, mirage_small, mirage_tiny

if TYPE_CHECKING:
    from mirage.restore.restorer import Restorer

__all__ = [
    "MIRAGE",
    "CheckpointError",
    "CheckpointWarning",
    "Restorer",
    "from_checkpoint",
    "load_checkpoint",
    "losses",
    "mirage_small",
    "mirage_tiny",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import the submodule ``mirage.<name>``, and `Restorer`, on first use."""
    if name == "Restorer":
        return importlib.import_module("mirage.restore.restorer").Restorer
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
