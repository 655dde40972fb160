"""What goes wrong with checkpoints, and what their reader should be told."""

from __future__ import annotations

__all__ = ["CheckpointError", "CheckpointWarning"]


class CheckpointError(RuntimeError):
    """A file that is no checkpoint, cannot be read safely, does not say which weights are meant, or does not fit."""


class CheckpointWarning(UserWarning):
    """A file holds other weights beside those that were read: averaged (EMA) ones were preferred, or cannot be read."""
