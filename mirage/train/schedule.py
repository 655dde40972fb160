"""Learning rates as a function of the step alone, so that a run that is resumed with other settings follows those."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mirage.train.config import Schedule

__all__ = ["Rates"]


@dataclass(frozen=True)
class Rates:
    """The learning rate of every step of a run.

    Args:
        schedule: the configuration's.
        lr: the highest rate.
        steps_per_epoch: optimizer steps of one pass over the data, which need not be whole.

    The rate rises linearly over the warm-up, then falls along a cosine to ``final_lr`` at the end of the training (or
    at ``horizon_epochs``), or (``wsd``) stays constant until ``decay_from`` and falls linearly from there to
    ``final_lr`` at the end.

    With ``by_epoch`` it is what the released code's scheduler makes of it. That one is asked for the rate of the epoch
    that has ended, so epoch ``e`` trains with the rate of epoch ``e - 1``, and in a warm-up of ``w`` epochs epoch ``e``
    has ``lr * e / (w - 1)``: the first two epochs have a rate of 0 and change no weight but batch norm's statistics.
    """

    schedule: Schedule
    lr: float
    steps_per_epoch: float

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        s = self.schedule
        return s.steps if s.steps is not None else int((s.epochs or 0) * self.steps_per_epoch)

    def at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        s = self.schedule
        if s.by_epoch:
            epoch, warmup = max(0, int(step / self.steps_per_epoch) - 1), s.warmup_epochs or 0
            end = s.horizon_epochs or s.epochs or self.steps / self.steps_per_epoch
            return self.lr * epoch / max(1, warmup - 1) if epoch < warmup else self._cosine(epoch, warmup, end)
        warmup = s.warmup if s.warmup_epochs is None else s.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if s.kind == "cosine":
            end = self.steps if s.horizon_epochs is None else s.horizon_epochs * self.steps_per_epoch
            return self._cosine(step, warmup, end)
        if s.decay_from is None:
            return self.lr
        return self._mix(1 - _part(step, s.decay_from, self.steps))

    def _cosine(self, now: float, start: float, end: float) -> float:
        return self._mix((1 + math.cos(math.pi * _part(now, start, end))) / 2)

    def _mix(self, high: float) -> float:
        return self.schedule.final_lr + (self.lr - self.schedule.final_lr) * high


def _part(now: float, start: float, end: float) -> float:
    """How much of the way from start to end is done, from 0 to 1."""
    return min(1.0, max(0.0, (now - start) / (end - start))) if end > start else 1.0
