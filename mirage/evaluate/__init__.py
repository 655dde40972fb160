"""Measure restored images: ``mirage evaluate``.

Sets of images (`sets`), noise with a stated generator (`noise`), what restores them (`methods`), metrics with their
definitions (`metrics`), the loop (`run`) with its results on disk (`results`), and what is made of them: tables beside
the paper's (`report`, `protocols`), sheets (`sheets`).
"""

from __future__ import annotations

from mirage.evaluate.metrics import METRICS, Metric, measure
from mirage.evaluate.noise import add_noise, noise_generator
from mirage.evaluate.results import Results, SettingsDiffer
from mirage.evaluate.run import Evaluation, Task, evaluate
from mirage.evaluate.sets import ImageSet, Item, find_sets

__all__ = [
    "METRICS",
    "Evaluation",
    "ImageSet",
    "Item",
    "Metric",
    "Results",
    "SettingsDiffer",
    "Task",
    "add_noise",
    "evaluate",
    "find_sets",
    "measure",
    "noise_generator",
]
