"""What numbers of a configuration can be."""

from __future__ import annotations

from operator import attrgetter

from mirage.train.config import Config, ConfigError

__all__ = ["check_numbers"]

AT_LEAST = {
    "seed": 0,
    "optimizer.lr": 0,
    "optimizer.clip": 0,
    "schedule.steps": 1,
    "schedule.epochs": 0,
    "schedule.warmup": 0,
    "schedule.warmup_epochs": 0,
    "schedule.horizon_epochs": 0,
    "schedule.final_lr": 0,
    "schedule.decay_from": 0,
    "data.batch": 1,
    "data.workers": 0,
    "data.cache": 0,
    "data.hold_out": 0,
    "trainer.nodes": 1,
    "trainer.accumulate": 1,
    "trainer.threads": 1,
    "output.checkpoint_minutes": 0,
    "output.checkpoint_steps": 1,
    "output.log_steps": 1,
    "output.validate_steps": 1,
}


def check_numbers(config: Config) -> None:
    """Refuse numbers with which no training can go on.

    Raises:
        ConfigError: one is too small, or no number; the message names it.
    """
    for name, least in AT_LEAST.items():
        value = attrgetter(name)(config)
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
